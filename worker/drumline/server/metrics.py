"""Prometheus metrics of one server, fed by its runners."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from drumline.runner.observer import Observer
from drumline.runner.status import RunnerStatus
from drumline.runner.ticket import Ticket

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_UP = frozenset({"ready", "busy", "paused"})

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics(Observer):
    """Counts what runners report. Labels are outcomes, reasons and rank numbers: few values each.

    Args:
        statuses: the runners' statuses now; asked when somebody reads the gauges.
    """

    def __init__(self, statuses: Callable[[], list[RunnerStatus]]) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "requests_total", "Requests that are over, by outcome (ok or problem).", "outcome"
        )
        self._restarts = self._counter("group_restarts_total", "Restarts of the group, by reason.", "reason")
        self._wait = self._histogram("queue_wait_seconds", "Time from submission until the ranks got the request.")
        self._duration = self._histogram("request_duration_seconds", "Time from submission to the end of the request.")
        self._first = self._histogram("time_to_first_event_seconds", "Time from submission to the first update.")
        self._rank_up = self._gauge("rank_up", "1 while the rank serves.", "rank")
        self._setup = self._gauge("setup_seconds", "How long the latest start of the ranks took.")
        in_flight = self._gauge("requests_in_flight", "Requests that the ranks run now.")
        in_flight.set_function(lambda: sum(status.in_flight for status in statuses()))
        depth = self._gauge("queue_depth", "Requests that wait for their turn.")
        depth.set_function(lambda: sum(status.queue_depth for status in statuses()))
        self._statuses = statuses
        self._by_outcome: dict[str, Counter] = {}
        self._count("ok", 0)

    def exposition(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        self._show_ranks()
        return generate_latest(self.registry)

    def refused(self, outcome: str) -> None:
        """Count a call that never got to a runner."""
        self._count(outcome)

    def request_started(self, ticket: Ticket) -> None:
        """Observe the wait."""
        if ticket.queue_wait is not None:
            self._wait.observe(ticket.queue_wait)

    def first_event(self, ticket: Ticket, seconds: float) -> None:
        """Observe the time to the first update."""
        self._first.observe(seconds)

    def request_finished(self, ticket: Ticket) -> None:
        """Count the request and observe its time."""
        self._count(ticket.outcome or "internal-error")
        self._duration.observe((ticket.queue_wait or 0.0) + (ticket.run_time or 0.0))

    def group_restarted(self, reason: str) -> None:
        """Count the restart."""
        self._restarts.labels(reason).inc()

    def setup_finished(self, seconds: float) -> None:
        """Show the start's time."""
        self._setup.set(seconds)

    def _count(self, outcome: str, number: int = 1) -> None:
        counter = self._by_outcome.get(outcome)
        if counter is None:
            counter = self._by_outcome[outcome] = self._requests.labels(outcome)
        counter.inc(number)

    def _show_ranks(self) -> None:
        ups: dict[int, bool] = {}
        for status in self._statuses():
            for rank in status.ranks:
                ups[rank.rank] = ups.get(rank.rank, True) and rank.state in _UP
        for number, up in ups.items():
            self._rank_up.labels(str(number)).set(up)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"drumline_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"drumline_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"drumline_{name}", text, registry=self.registry, buckets=_SECONDS)

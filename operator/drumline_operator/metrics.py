"""What the operator counts, in Prometheus' text format (docs/reference/metrics.md)."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from drumline_operator.apps import Facts

_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The operator's metrics, in a registry of their own.

    Args:
        depth: returns how many keys are due.
        apps: returns facts about all apps.
        ages: returns the seconds since each watched kind was last heard of.
    """

    def __init__(
        self, depth: Callable[[], int], apps: Callable[[], Iterable[Facts]], ages: Callable[[], Mapping[str, float]]
    ) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.duration = Histogram(
            "drumline_operator_reconcile_duration_seconds",
            "Time of one run for one app or MachineType",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.reconciles = Counter(
            "drumline_operator_reconcile",
            "Runs by result: success, error, or gone (the object is no more)",
            ["result"],
            registry=self.registry,
        )
        for result in ("success", "error", "gone"):
            self.reconciles.labels(result)
        self.writes = Counter(
            "drumline_operator_api_writes",
            "Calls that may change something in the API server, by HTTP method; not those for the Lease",
            ["method"],
            registry=self.registry,
        )
        self.leader = Gauge("drumline_operator_leader", "1 while this process leads, else 0", registry=self.registry)
        self.registry.register(_Looked(depth, apps, ages))

    def wrote(self, method: str) -> None:
        """Count a call that may change something."""
        self.writes.labels(method).inc()


class _Looked(Collector):
    """What is looked up when somebody asks."""

    def __init__(
        self, depth: Callable[[], int], apps: Callable[[], Iterable[Facts]], ages: Callable[[], Mapping[str, float]]
    ) -> None:
        self._depth, self._apps, self._ages = depth, apps, ages

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "drumline_operator_workqueue_depth",
            "Apps and MachineTypes that are due and wait for a worker",
            self._depth(),
        )
        apps = GaugeMetricFamily(
            "drumline_operator_apps", "Apps by condition and its reason", labels=["condition", "reason"]
        )
        tally = Tally((type, reason) for facts in self._apps() for type, _, reason in facts.conditions)
        for (type, reason), count in sorted(tally.items()):
            apps.add_metric([type, reason], count)
        yield apps
        ages = GaugeMetricFamily(
            "drumline_operator_watch_last_event_age_seconds",
            "Time since a watched kind was last heard of, bookmarks included",
            labels=["kind"],
        )
        for kind, age in sorted(self._ages().items()):
            ages.add_metric([kind], age)
        yield ages

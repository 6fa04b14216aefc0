"""What others may watch: metrics and logs hang on here; the runner knows neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drumline.runner.status import RunnerStatus
    from drumline.runner.ticket import Ticket


class Observer:
    """Base class whose methods do nothing; override what is of interest. Called on the event loop, must not block."""

    def request_queued(self, ticket: Ticket) -> None:
        """A request was accepted."""

    def request_started(self, ticket: Ticket) -> None:
        """The ranks were given the request; ``queue_wait`` is set."""

    def first_event(self, ticket: Ticket, seconds: float) -> None:
        """The first update arrived ``seconds`` after the request was queued."""

    def request_finished(self, ticket: Ticket) -> None:
        """The request is over; ``outcome`` and ``run_time`` are set."""

    def group_restarted(self, reason: str) -> None:
        """The group is being restarted."""

    def status_changed(self, status: RunnerStatus) -> None:
        """The status has a new version."""

    def setup_finished(self, seconds: float) -> None:
        """All ranks became ready ``seconds`` after their processes were asked for."""

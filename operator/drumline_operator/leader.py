"""Who leads: one candidate's view of a Lease. PURE: told what is read and written, and when; decides what to write.

Only differences of the own clock count. A holder is dead when its record has not changed for a whole lease duration
*as watched from here*; what its clock says does not matter. A leader stops earlier, ``renew_deadline`` after it *began*
its last successful renewal, so it has stopped before anybody else may start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Record:
    """What a Lease says. ``acquired`` and ``renewed``: RFC 3339 with microseconds; ``holder``: empty when released."""

    holder: str
    duration: int
    acquired: str
    renewed: str
    transitions: int = 0


@dataclass(frozen=True)
class Write:
    """Write ``record``; ``fresh``: there is no Lease yet. It must fail when somebody else wrote since the last read."""

    record: Record
    fresh: bool


class Candidate:
    """One that wants to lead.

    Args:
        identity: unlike everybody else's.
        lease_duration: whole seconds without a renewal after which others take over.
        renew_deadline: seconds after which this one stops leading when it cannot renew.
    """

    def __init__(self, identity: str, lease_duration: int, renew_deadline: float) -> None:
        self.identity, self._lease_duration, self._renew_deadline = identity, lease_duration, renew_deadline
        self._seen: Record | None = None
        self._seen_at = 0.0
        self._renewed_at: float | None = None

    def leading(self, now: float) -> bool:
        """Whether this one leads at time ``now``."""
        deadline = self.deadline
        return deadline is not None and now < deadline

    @property
    def deadline(self) -> float | None:
        """When leading ends without a renewal; None for one that does not lead."""
        return None if self._renewed_at is None else self._renewed_at + self._renew_deadline

    def decide(self, found: Record | None, stamp: str, now: float) -> Write | None:
        """Return what to write about the Lease that was just read, or None: wait.

        Args:
            found: what was read; None: there is no Lease.
            stamp: the time of day, for people who read the Lease.
            now: seconds of the own clock, taken after the Lease was read: it was renewed before.
        """
        if found is None:
            return Write(Record(self.identity, self._lease_duration, stamp, stamp), fresh=True)
        if found != self._seen:
            self._seen, self._seen_at = found, now
        if found.holder == self.identity:
            return Write(replace(found, duration=self._lease_duration, renewed=stamp), fresh=False)
        self._renewed_at = None  # somebody else has it
        # The holder's own duration counts when it is longer: it may have been told another one.
        if found.holder and now < self._seen_at + max(self._lease_duration, found.duration):
            return None
        taken = Record(self.identity, self._lease_duration, stamp, stamp, found.transitions + 1)
        return Write(taken, fresh=False)

    def wrote(self, record: Record, began: float) -> None:
        """The write of ``record`` has succeeded; ``began``: when the attempt did."""
        self._seen, self._seen_at = record, began
        self._renewed_at = began

    def stopped(self) -> None:
        """What the leader did has ended, because its time was over or at its own wish."""
        self._renewed_at = None

    def release(self, stamp: str) -> Record | None:
        """Return what to write so that others need not wait, or None when this one does not hold the Lease."""
        if self._seen is None or self._seen.holder != self.identity:
            return None
        return replace(self._seen, holder="", duration=1, renewed=stamp)


def record_of(spec: Mapping[str, Any]) -> Record:
    """Return what a Lease's spec says."""
    return Record(
        holder=spec.get("holderIdentity") or "",
        duration=int(spec.get("leaseDurationSeconds") or 0),
        acquired=spec.get("acquireTime") or "",
        renewed=spec.get("renewTime") or "",
        transitions=int(spec.get("leaseTransitions") or 0),
    )


def spec_of(record: Record) -> dict[str, Any]:
    """Return a Lease's spec."""
    return {
        "holderIdentity": record.holder,
        "leaseDurationSeconds": record.duration,
        "acquireTime": record.acquired,
        "renewTime": record.renewed,
        "leaseTransitions": record.transitions,
    }

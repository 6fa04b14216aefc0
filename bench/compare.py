"""Whether a quick run is as good as the committed one. Only ratios are compared: they mean the same on another machine.

A quick run is one short round or two, often beside other programs: it raises a suspicion, no more. What looks worse in it
is measured again, and then the rounds of both are counted. No round is left out because of what it says: one that is as
good as committed counts however busy the machine was, one that is worse counts unless others had the machine meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bench.report import RESULTS, Row, number, read

#: A ratio may get so many times worse before it is a regression: a short run on a busy machine is rough.
TOLERANCE = 2.0
#: How often what looks worse is measured again, at most.
AGAIN = 5
#: The share of the machine that others may have for a worse round to count. What waits for a core at each of its steps,
#: as a request does that passes through four processes, is slowed by them more than its floor.
OTHERS = 0.25
#: Microseconds: a floor that takes less is as much clock, cache and calls as it is work.
SHORT = 20.0

_US = {"floor_us": 1.0, "floor_ms": 1e3, "floor_s": 1e6}
_TAILS = {"peers-tail-32", "peers-delay"}


def _floor_us(row: Row) -> float | None:
    times = [parts[name] * factor for parts in row.parts for name, factor in _US.items() if name in parts]
    return median(times) if times else None


def _short(row: Row) -> bool:
    floor = _floor_us(row)
    return floor is not None and floor < SHORT


#: Rows that are not compared, and why: the first that holds for the committed row.
NOT_COMPARED: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("times, rates and memory are the machine's", lambda row: row.unit != "x" and not _none_wanted(row)),
    ("no floor: shares and percentiles of ours alone", lambda row: row.unit == "x" and not _has_floor(row)),
    (f"the floor takes less than {SHORT:g} µs; `invoke` has one for what is left", _short),
    ("the slowest in a hundred of a few requests", lambda row: row.key in _TAILS),
)


def _has_floor(row: Row) -> bool:
    return any(part.startswith("floor") for parts in row.parts for part in parts)


def _none_wanted(row: Row) -> bool:
    """Whether the row counts what must not happen at all, e.g. wake-ups of an idle server."""
    return row.goal == 0 and not row.at_least and row.unit != "x"


def why_not(row: Row) -> str | None:
    """Return why a row is not compared; None: it is. PURE."""
    return next((reason for reason, holds in NOT_COMPARED if holds(row)), None)


@dataclass(frozen=True)
class Finding:
    """What is to be said about one row.

    Attributes:
        key: of the row; of new ones, all of them.
        text: what was found.
        bad: whether the run has failed because of it.
    """

    key: str
    text: str
    bad: bool = False

    def __str__(self) -> str:
        """One line."""
        return f"{'WORSE' if self.bad else 'note'}: {self.key}: {self.text}"


def committed(name: str) -> list[Row]:
    """Return the rows of ``bench/results/<name>.json``; none when there is no such file."""
    path = RESULTS / f"{name}.json"
    return read(json.loads(path.read_text())) if path.is_file() else []


def worse(before: Row, value: float, at_least: bool) -> bool:
    """Return whether one round's value is a regression. PURE.

    A ratio is when it is less than half as good as the committed median; a count of what must not happen when it did.
    """
    if _none_wanted(before):
        return value > 0
    return value * TOLERANCE < before.value if at_least else value > before.value * TOLERANCE


@dataclass(frozen=True)
class Count:
    """The rounds of one row.

    Attributes:
        fine: as good as committed.
        bad: worse, on a machine that we had nearly for ourselves.
        void: worse, while others used more than :data:`OTHERS` of the machine.
    """

    fine: int
    bad: int
    void: int

    @classmethod
    def of(cls, before: Row, now: Row) -> Count:
        """Count. PURE."""
        fine = bad = void = 0
        for i, value in enumerate(now.values):
            others = now.others[i] if i < len(now.others) else 0.0
            if not worse(before, value, now.at_least):
                fine += 1
            elif others > OTHERS and not _none_wanted(before):  # a count is not slowed by others
                void += 1
            else:
                bad += 1
        return cls(fine, bad, void)

    @property
    def rounds(self) -> int:
        """All of them."""
        return self.fine + self.bad + self.void


@dataclass(frozen=True)
class Suspect:
    """A row that looks worse.

    Attributes:
        before: as committed.
        now: its rounds, those that are measured again among them.
        total: how many rounds there will be, at most.
    """

    before: Row
    now: Row
    total: int

    @property
    def decided(self) -> bool:
        """Whether further rounds would change nothing."""
        count, need = Count.of(self.before, self.now), self.total // 2 + 1
        if _none_wanted(self.before) and count.fine:
            return True
        return count.bad >= need or count.bad + self.total - count.rounds < need

    def verdict(self) -> Finding:
        """Say what came of it."""
        count = Count.of(self.before, self.now)
        if count.bad > self.total // 2 and not (_none_wanted(self.before) and count.fine):
            return Finding(self.before.key, f"worse in {count.bad} of {count.rounds} rounds: {self}", bad=True)
        if count.void:
            busy = f"others used more than {OTHERS:.0%} of the machine in {count.void} of {count.rounds} rounds"
            return Finding(self.before.key, f"not judged, {busy}: {self}")
        return Finding(self.before.key, f"as good as committed in {count.fine} of {count.rounds} rounds: {self}")

    def __str__(self) -> str:
        """What was measured."""
        sign = "x" if self.now.unit == "x" else f" {self.now.unit}"
        values = ", ".join(map(number, self.now.values))
        note = f" ({self.now.note})" if self.now.note else ""
        return f"{self.before.key}: {values}{sign}; committed is {number(self.before.value)}{sign}{note}"


def judge(
    before: list[Row],
    now: list[Row],
    again: Callable[[list[str]], list[Row]],
    say: Callable[[str], None],
    times: int = AGAIN,
) -> list[Finding]:
    """Compare a quick run with the committed one, and measure again what looks worse.

    - A row looks worse when it is so in every round of the quick run. It is worse when it is so in most of the rounds of
      the quick run and of those ``times`` more. One is measured no more as soon as that is decided.
    - A row that is committed as part of quick runs and was not measured is worse; one that is not committed is a note.

    Args:
        before: committed rows.
        now: of the quick run; rounds that are measured again are added to them.
        again: measures these rows, given by their keys, for one more round; rows beside them are ignored.
        say: takes lines for people.
        times: how often ``again`` is called, at most.
    """
    old = {row.key: row for row in before}
    measured = {row.key for row in now}
    findings = [
        Finding(row.key, "committed, but not measured any more", bad=True)
        for row in before
        if row.quick and row.key not in measured
    ]
    if new := [row.key for row in now if row.key not in old]:
        findings.append(Finding(", ".join(new), "not committed yet: measure without --quick"))
    known = [(old[row.key], row) for row in now if row.key in old]
    for reason in dict.fromkeys(why_not(each) for each, _ in known):
        if reason is not None:
            say(f"not compared, {reason}: {', '.join(each.key for each, _ in known if why_not(each) == reason)}")
    suspects = [Suspect(each, row, len(row.values) + times) for each, row in known if why_not(each) is None]
    suspects = [suspect for suspect in suspects if Count.of(suspect.before, suspect.now).fine == 0]
    for suspect in suspects:
        say(f"looks worse: {suspect}")
    for i in range(times):
        open_ = [suspect.before.key for suspect in suspects if not suspect.decided]
        if not open_:
            break
        say(f"measured again, {i + 1} of at most {times}, for one quick round proves nothing: {', '.join(open_)}")
        found = {row.key: row for row in again(open_)}
        for suspect in suspects:
            if suspect.before.key in open_ and suspect.before.key in found:
                suspect.now.extend(found[suspect.before.key])
    return findings + [suspect.verdict() for suspect in suspects]

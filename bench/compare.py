"""Whether a quick run is as good as the committed one. Only ratios are compared: they mean the same on another machine."""

from __future__ import annotations

import json
from dataclasses import dataclass

from bench.report import RESULTS, Row, number, read

#: A ratio may get so many times worse before it is a regression: a short run on a busy machine is rough.
TOLERANCE = 2.0


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
    bad: bool

    def __str__(self) -> str:
        """One line."""
        return f"{'WORSE' if self.bad else 'note'}: {self.key}: {self.text}"


def committed(name: str) -> list[Row]:
    """Return the rows of ``bench/results/<name>.json``; none when there is no such file."""
    path = RESULTS / f"{name}.json"
    return read(json.loads(path.read_text())) if path.is_file() else []


def compare(before: list[Row], now: list[Row], *, ratios: bool = True) -> list[Finding]:
    """Compare the rows of a quick run with the committed ones. PURE.

    - A ratio to a floor is worse when the best of its rounds is less than half as good as the committed median.
    - A count whose goal is 0 is worse when it was 0 in no round.
    - A row that is committed as part of quick runs and was not measured is worse; one that is not committed is a note.
    - Times, rates and memory are not compared: they are the machine's.

    Args:
        before: committed rows.
        now: of the quick run.
        ratios: False only tells of ratios that are worse: what is slowed by other work is not always its floor as well.
    """
    findings = []
    old = {row.key: row for row in before}
    if new := [row.key for row in now if row.key not in old]:
        findings.append(Finding(", ".join(new), "not committed yet: measure without --quick", bad=False))
    for row in (row for row in now if row.key in old):
        if (text := _worse(old[row.key], row)) is not None:
            findings.append(Finding(row.key, text, bad=ratios or row.goal == 0))  # noqa: PERF401  # one line too long
    measured = {row.key for row in now}
    missing = [row.key for row in before if row.quick and row.key not in measured]
    return findings + [Finding(key, "committed, but not measured any more", bad=True) for key in missing]


def _worse(before: Row, now: Row) -> str | None:
    best = max(now.values) if now.at_least else min(now.values)
    if now.goal == 0 and not now.at_least and now.unit != "x":
        return f"{number(best)} {now.unit} instead of none ({now.note})" if best > 0 else None
    if now.unit != "x" or not any(part.startswith("floor") for parts in now.parts for part in parts):
        return None
    fell = best * TOLERANCE < before.value if now.at_least else best > before.value * TOLERANCE
    return f"{number(best)}x at best; committed is {number(before.value)}x" if fell else None

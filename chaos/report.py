"""What a run was and what it found, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from bench.report import machine


@dataclass
class Report:
    """The outcome of a run.

    Attributes:
        seed: of the schedule.
        callers: clients at a time.
        ranks: world size.
        faults: by kind.
        slowest: seconds from a fault to readiness, the longest by kind.
        requests: how many began.
        outcomes: how they ended.
        lives: of the server.
        budgets: times that the restart budget was used up.
        slopes: growth of the server's memory in MiB per 100 faults, per life that was long enough.
        seconds: of the whole run.
        wrongs: everything that was wrong.
        facts: of the machine.
    """

    seed: int
    callers: int
    ranks: int
    faults: dict[str, int] = field(default_factory=dict)
    slowest: dict[str, float] = field(default_factory=dict)
    requests: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    lives: int = 0
    budgets: int = 0
    slopes: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    wrongs: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=machine)

    def text(self) -> str:
        """Return a few lines for people."""
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        kinds = ", ".join(f"{name} {count} ({self.slowest[name]:.1f} s)" for name, count in sorted(self.faults.items()))
        slopes = ", ".join(f"{slope:+.1f}" for slope in self.slopes.values())
        lines = [
            f"{sum(self.faults.values())} faults in {self.seconds:.0f} s, slowest in brackets: {kinds}",
            f"{self.requests} requests: {outcomes}",
            f"{self.lives} lives of the server, {self.budgets} budgets used up"
            + (f"; memory of a server: {slopes} MiB per 100 faults" if slopes else ""),
            *(f"WRONG: {wrong}" for wrong in self.wrongs[:20]),
        ]
        return "\n".join([*lines, "clean"] if not self.wrongs else lines)

    def json(self) -> str:
        """Return the document of ``bench/results``."""
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": self.facts,
            "seed": self.seed,
            "callers": self.callers,
            "ranks": self.ranks,
            "duration_s": round(self.seconds, 1),
            "faults": dict(sorted(self.faults.items())),
            "slowest_s": {kind: round(value, 2) for kind, value in sorted(self.slowest.items())},
            "requests": self.requests,
            "outcomes": dict(sorted(self.outcomes.items())),
            "server_lives": self.lives,
            "budgets_used_up": self.budgets,
            "server_memory_mib_per_100_faults": [round(slope, 2) for slope in self.slopes.values()],
            "findings": self.wrongs,
        }
        return json.dumps(document, indent=1) + "\n"

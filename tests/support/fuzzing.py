"""How long random tests go on: a fixed, short run in CI, and ``make fuzz`` with a seed and as many more as asked for."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

#: Set by ``make fuzz``: how many times the examples of CI, with the seed that pytest is given.
TIMES = int(os.environ.get("FUZZ_TIMES", "0"))


def examples(count: int) -> settings:
    """Return settings for ``count`` examples, always the same ones in CI."""
    return settings(
        max_examples=count * max(TIMES, 1),
        derandomize=not TIMES,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )

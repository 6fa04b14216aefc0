"""What a quick run of the benches is compared with, and how; and the arithmetic of curves and slopes."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def compare() -> ModuleType:
    from bench import compare

    return compare


def row(key: str, *values: float, floor: str = "floor_us", **options: Any) -> Any:
    from bench.report import Row

    made = Row(key, key, **options)
    for value in values:
        made.add(value, ours_us=value, **({floor: 1.0} if floor else {}))
    return made


def bad(compare: ModuleType, before: list[Any], now: list[Any]) -> list[str]:
    return [finding.key for finding in compare.compare(before, now) if finding.bad]


@pytest.mark.parametrize(
    ("at_least", "committed", "now", "worse"),
    [
        (False, 1.0, [1.99], False),
        (False, 1.0, [2.01], True),
        (False, 1.0, [9.0, 2.0], False),  # one round was good enough: what is worse is worse every time
        (True, 1.0, [0.51], False),
        (True, 1.0, [0.49], True),
        (True, 1.0, [0.1, 0.5], False),
        (True, 1.0, [50.0], False),
        (False, 1.0, [0.01], False),
    ],
)
def test_a_ratio_is_worse_when_it_is_less_than_half_as_good(
    compare: ModuleType, at_least: bool, committed: float, now: list[float], worse: bool
) -> None:
    before = [row("a", committed, at_least=at_least)]
    assert bad(compare, before, [row("a", *now, at_least=at_least)]) == (["a"] if worse else [])


def test_on_a_busy_machine_ratios_are_told_and_the_rest_is_judged(compare: ModuleType) -> None:
    before = [row("a", 1.0), row("wakeups", 0.0, unit="/s", goal=0), row("gone", 1.0)]
    findings = compare.compare(before, [row("a", 9.0), row("wakeups", 1.0, unit="/s", goal=0)], ratios=False)
    assert [(finding.key, finding.bad) for finding in findings] == [("a", False), ("wakeups", True), ("gone", True)]


def test_times_rates_and_ratios_without_a_floor_are_not_compared(compare: ModuleType) -> None:
    before = [row("ms", 1.0, unit="ms"), row("rate", 100.0, unit="/s", at_least=True), row("tail", 1.0, floor="")]
    now = [row("ms", 99.0, unit="ms"), row("rate", 1.0, unit="/s", at_least=True), row("tail", 99.0, floor="")]
    assert compare.compare(before, now) == []


def test_what_has_to_be_none_is_worse_when_it_never_is(compare: ModuleType) -> None:
    before = [row("wakeups", 0.0, unit="/s", goal=0)]
    assert bad(compare, before, [row("wakeups", 0.0, 3.0, unit="/s", goal=0)]) == []
    assert bad(compare, before, [row("wakeups", 1.0, 3.0, unit="/s", goal=0)]) == ["wakeups"]


def test_a_missing_row_is_worse_and_a_new_one_is_told(compare: ModuleType) -> None:
    before = [row("gone", 1.0), row("only in whole runs", 1.0, quick=False), row("kept", 1.0)]
    findings = compare.compare(before, [row("kept", 1.0), row("new", 1.0), row("too", 1.0)])
    assert [(finding.key, finding.bad) for finding in findings] == [("new, too", False), ("gone", True)]
    assert str(findings[1]).startswith("WORSE: gone: ")


def test_every_program_has_its_own_name_keys_and_make_target() -> None:
    from bench.programs import PROGRAMS

    targets = (ROOT / "Makefile").read_text()
    names = [program.name for program in PROGRAMS]
    assert len(set(names)) == len(names)
    for program in PROGRAMS:
        assert f"\nbench-{program.name}: setup" in targets
        assert set(program.chosen(True)) <= set(program.benches)
        path = ROOT / "bench" / "results" / f"{program.name}.json"
        keys = Counter(each["key"] for each in json.loads(path.read_text())["rows"]) if path.is_file() else Counter()
        assert [key for key, count in keys.items() if count > 1] == []


def test_curves_become_one_table_each_along_the_axis() -> None:
    from bench.curves import size, tables
    from bench.program import Program

    rows = [
        row("b2", 3.0, curve="b", x=1 << 20),
        row("b1", 2.0, 4.0, curve="b", x=64),
        row("plain", 1.0),
        row("a1", 1.0, curve="a", x=64, goal=0.5),
    ]
    program = Program("p", "P", (), None, None, axis="size", axis_bytes=True)
    lines = [line for line in tables(program, rows).splitlines() if line.startswith(("**", "| 64", "| 1 "))]
    assert lines == [
        "**b1**",
        "| 64 B | 3.00 µs | 1.00 µs | 3.00x | 2.00 .. 4.00 |",
        "| 1 MiB | 3.00 µs | 1.00 µs | 3.00x | 3.00 .. 3.00 |",
        "**a1**",
        "| 64 B | 1.00 µs | 1.00 µs | 1.00x | 1.00 .. 1.00 | MISSED |",
    ]
    assert [size(n) for n in (64, 1024, 200 << 20)] == ["64 B", "1 KiB", "200 MiB"]


@pytest.mark.parametrize("growth", [0.0, 40.0])
def test_the_interval_of_a_slope_holds_it_in_95_of_100_runs(growth: float) -> None:
    from bench.soak import slope_of

    noise = random.Random(3)
    xs = [float(i * 1000) for i in range(21)]
    runs = [slope_of(xs, [5e7 + growth * x + noise.gauss(0, 1e4) for x in xs]) for _ in range(500)]
    held = sum(abs(run.per_x - growth) < run.margin for run in runs)
    assert 0.93 < held / len(runs) < 0.97
    assert slope_of([0, 1, 2], [1, 3, 5]).per_x == pytest.approx(2)


async def test_the_open_loop_client_does_not_wait_for_answers() -> None:
    """A server that answers nothing until the last request has come: a client that waits would never send it."""
    waiting: list[asyncio.StreamWriter] = []
    expected = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(2) == b"{}"
                waiting.append(writer)
                if len(waiting) == expected:
                    for i, each in enumerate(waiting):
                        each.write(b"HTTP/1.1 %d X\r\ncontent-length: 3\r\n\r\nabc" % (429 if i % 2 else 200))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    chance, at = random.Random(7), 0.0
    while (at := at + chance.expovariate(200)) < 0.5:
        expected += 1
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    command = [sys.executable, "-m", "bench.open_load", "--port", str(port), "--rate", "200", "--seconds", "0.5"]
    async with server:
        process = await asyncio.create_subprocess_exec(*command, "--connections", "4", stdout=subprocess.PIPE, cwd=ROOT)
        out, _ = await process.communicate()
    assert process.returncode == 0
    seen = json.loads(out)
    assert seen["sent"] == expected
    assert {status: len(each) for status, each in seen["latencies"].items()} == {
        "200": (expected + 1) // 2,
        "429": expected // 2,
    }
    # From when they were due: the first has waited for nearly all of the time, the last for almost none of it.
    latencies = sorted(seen["latencies"]["200"])
    assert latencies[-1] > latencies[0]

"""What a quick run of the benches is compared with, and how; and the arithmetic of curves and slopes."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
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


def row(key: str, *values: float, floor: str = "floor_us", floor_value: float = 1000.0, **options: Any) -> Any:
    from bench.report import Row

    made = Row(key, key, **options)
    for value in values:
        made.add(value, ours_us=value, **({floor: floor_value} if floor else {}))
    return made


class Bench:
    """Stands for a program that is run: gives the next rounds of its rows, and keeps what it was asked for.

    Args:
        values: by key, what each further round gives.
        others: what others have of the machine meanwhile.
    """

    def __init__(self, others: float = 0.0, **values: Iterable[float]) -> None:
        self.others = others
        self.values = {key: iter(each) for key, each in values.items()}
        self.asked: list[list[str]] = []
        self.said: list[str] = []

    def __call__(self, keys: list[str]) -> list[Any]:
        self.asked.append(keys)
        rows = [row(key, next(values)) for key, values in self.values.items()]
        for each in rows:
            each.beside(self.others)
        return rows

    def judge(self, compare: ModuleType, before: list[Any], now: list[Any]) -> list[str]:
        """Return the keys that are worse."""
        self.findings = compare.judge(before, now, self, self.said.append)
        return [finding.key for finding in self.findings if finding.bad]


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
def test_a_ratio_that_is_less_than_half_as_good_in_every_quick_round_is_measured_again(
    compare: ModuleType, at_least: bool, committed: float, now: list[float], worse: bool
) -> None:
    bench = Bench(a=itertools.repeat(now[0]), b=itertools.repeat(1.0))
    before = [row("a", committed, at_least=at_least), row("b", 1.0)]
    assert bench.judge(compare, before, [row("a", *now, at_least=at_least), row("b", 1.0)]) == (["a"] if worse else [])
    assert all(keys == ["a"] for keys in bench.asked)  # never of the others
    assert bool(bench.asked) == worse
    told = [line for line in bench.said if line.startswith("measured again")]
    assert len(told) == len(bench.asked) <= compare.AGAIN
    assert bool(bench.said) == worse


@pytest.mark.parametrize(
    ("first", "again", "rounds", "worse"),
    [
        ([3.0], [3.0, 3.0, 3.0], 4, True),  # four of six are most of them: nobody waits for the rest
        ([3.0], [1.0, 1.0, 1.0], 4, False),
        ([3.0], [1.0, 3.0, 1.0, 3.0, 1.0], 6, False),  # half is not most
        ([3.0], [1.0, 3.0, 1.0, 3.0, 3.0], 6, True),
        ([3.0, 3.0], [3.0, 3.0], 4, True),  # of seven
        ([3.0, 3.0], [1.0, 1.0, 1.0, 1.0], 6, False),
        ([3.0, 3.0], [1.0, 1.0, 3.0, 1.0, 1.0], 7, False),
    ],
)
def test_most_of_the_rounds_of_both_looks_decide(
    compare: ModuleType, first: list[float], again: list[float], rounds: int, worse: bool
) -> None:
    bench, now = Bench(a=again), row("a", *first)
    assert bench.judge(compare, [row("a", 1.0)], [now]) == (["a"] if worse else [])
    assert len(now.values) == rounds
    (finding,) = bench.findings
    assert f"of {rounds} rounds" in finding.text


def test_what_is_worse_beside_others_is_told_and_not_judged(compare: ModuleType) -> None:
    now = row("a", 9.0)
    now.beside(compare.OTHERS + 0.1)
    bench = Bench(others=compare.OTHERS + 0.1, a=itertools.repeat(9.0))
    assert bench.judge(compare, [row("a", 1.0)], [now]) == []
    assert "not judged, others used more than" in str(bench.findings[0])
    assert len(bench.asked) == 2  # a third round that does not count: no majority can come any more
    # What is good although others work is good.
    now = row("a", 9.0)
    now.beside(compare.OTHERS + 0.1)
    assert Bench(others=0.9, a=itertools.repeat(1.0)).judge(compare, [row("a", 1.0)], [now]) == []
    # The first look was disturbed, the proper measurement was not.
    now = row("a", 9.0)
    now.beside(compare.OTHERS + 0.1)
    assert Bench(a=itertools.repeat(9.0)).judge(compare, [row("a", 1.0)], [now]) == ["a"]


@pytest.mark.parametrize("at_least", [False, True])
@pytest.mark.parametrize("rounds", [1, 2])
def test_noise_is_no_regression_and_three_times_as_slow_is_one(
    compare: ModuleType, rounds: int, at_least: bool
) -> None:
    """Rounds differ by a tenth, and one of twenty is four times as slow; 500 runs of a bench that is as good, or a third."""
    chance = random.Random(11)

    def values(slower: float) -> Iterator[float]:
        while True:
            slow = slower * chance.lognormvariate(0, 0.1) * (4 if chance.random() < 0.05 else 1)
            yield 1 / slow if at_least else slow

    def runs(slower: float) -> tuple[int, int]:
        worse = again = 0
        for _ in range(500):
            source = values(slower)
            bench = Bench(a=source)
            now = row("a", *itertools.islice(source, rounds), at_least=at_least)
            worse += bool(bench.judge(compare, [row("a", 1.0, at_least=at_least)], [now]))
            again += bool(bench.asked)
        return worse, again

    false, looked_again = runs(1.0)
    assert false == 0
    assert looked_again > 0  # else this noise proves nothing
    assert runs(3.0) == (500, 500)


def test_no_noise_of_a_busy_machine_is_a_regression(compare: ModuleType) -> None:
    """What others take slows every round by much more than its floor; sometimes they pause."""
    chance = random.Random(5)
    disturbed = 0
    for _ in range(500):
        busy = [chance.choice([0.0, 0.3, 0.6, 0.9]) for _ in range(10)]
        slow = iter([(math.exp(3 * share), share) for share in busy])

        def again(keys: list[str], slow: Iterator[tuple[float, float]] = slow) -> list[Any]:
            value, share = next(slow)
            made = row(keys[0], value)
            made.beside(share)
            return [made]

        found = compare.judge([row("a", 1.0)], again(["a"]), again, lambda _: None)
        assert not any(finding.bad for finding in found)
        disturbed += bool(found)
    assert disturbed > 100


def test_what_is_not_compared_is_told_with_its_reason(compare: ModuleType) -> None:
    before = [
        row("ms", 1.0, unit="ms"),
        row("rate", 100.0, unit="/s", at_least=True),
        row("fair", 1.0, floor=""),
        row("copy", 1.0, floor_value=compare.SHORT * 0.9),
        row("copy-ms", 1.0, floor="floor_ms", floor_value=compare.SHORT * 0.9e-3),
        row("peers-tail-32", 1.0, floor="floor_n"),
    ]
    now = [row(each.key, 0.01 if each.at_least else 99.0, unit=each.unit, at_least=each.at_least) for each in before]
    bench = Bench()
    assert bench.judge(compare, before, now) == []
    assert bench.asked == []
    assert [line.rpartition(": ")[2] for line in bench.said] == ["ms, rate", "fair", "copy, copy-ms", "peers-tail-32"]
    assert all(line.startswith("not compared, ") for line in bench.said)
    # A floor that takes its time is one.
    before = [row("copy", 1.0, floor_value=compare.SHORT * 1.1)]
    assert Bench(copy=itertools.repeat(99.0)).judge(compare, before, [row("copy", 99.0)]) == ["copy"]


def test_what_has_to_be_none_is_worse_when_it_never_is(compare: ModuleType) -> None:
    options: dict[str, Any] = {"unit": "/s", "goal": 0}
    before = [row("wakeups", 0.0, **options)]
    assert Bench().judge(compare, before, [row("wakeups", 0.0, 3.0, **options)]) == []
    assert Bench(wakeups=[0.0]).judge(compare, before, [row("wakeups", 1.0, 3.0, **options)]) == []
    now = row("wakeups", 1.0, 3.0, **options)
    now.beside(0.9)  # others do not wake our threads
    assert Bench(wakeups=itertools.repeat(2.0)).judge(compare, before, [now]) == ["wakeups"]


def test_a_missing_row_is_worse_and_a_new_one_is_told(compare: ModuleType) -> None:
    before = [row("gone", 1.0), row("only in whole runs", 1.0, quick=False), row("kept", 1.0)]
    findings = compare.judge(before, [row("kept", 1.0), row("new", 1.0), row("too", 1.0)], Bench(), print)
    assert [(finding.key, finding.bad) for finding in findings] == [("gone", True), ("new, too", False)]
    assert str(findings[0]).startswith("WORSE: gone: ")


COMPUTE = """
import os, sys
while os.times()[0] < float(sys.argv[1]):
    pass
print("computed", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("alive", [False, True])
def test_what_our_children_compute_is_not_others(alive: bool) -> None:
    """In seconds of a core, which are the same however busy the machine is; the kernel counts in hundredths."""
    from bench import others

    seconds, exact = 0.4, 0.1
    busy, own = others._busy_seconds(), others._own_seconds()
    with subprocess.Popen([sys.executable, "-c", COMPUTE, str(seconds)], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"computed\n"
        if not alive:
            process.communicate()
        used = others._own_seconds() - own
        assert used > seconds - exact
        assert others._busy_seconds() - busy > seconds - exact


def test_what_is_computed_elsewhere_is_others() -> None:
    """By a process whose parent has ended, so that it is no child of ours."""
    from bench import others

    seconds = 0.4
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {COMPUTE!r}, '{seconds}'])"
    meter, own = others.Others(), others._own_seconds()
    with subprocess.Popen([sys.executable, "-c", orphan], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"computed\n"
        share = meter.share()
        process.communicate()
    assert others._own_seconds() - own < seconds
    assert 0 < share <= 1


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
        row("b2", 3.0, curve="b", x=1 << 20, floor_value=1.0),
        row("b1", 2.0, 4.0, curve="b", x=64, floor_value=1.0),
        row("plain", 1.0),
        row("a1", 1.0, curve="a", x=64, goal=0.5, floor_value=1.0),
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

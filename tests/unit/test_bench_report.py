"""The bench's own arithmetic: rows, goals, the table; and its load client against a server that counts."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BODY = b'{"prompt": "x"}'


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import report

    return report


def test_a_row_is_the_median_of_its_rounds_against_a_goal_of_either_direction(report: ModuleType) -> None:
    row = report.Row("k", "title", 2.0)
    for value in (1.0, 9.0, 2.0):
        row.add(value, ours_ms=value * 10, floor_ms=10.0)
    assert row.value == 2.0
    assert row.met is True
    assert row.part_text() == "ours 20.0 ms, floor 10.0 ms"
    row.goal = 1.9
    assert row.met is False
    row.at_least = True
    assert row.met is True
    row.goal = None
    assert row.met is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (98765, "98765")],
)
def test_numbers_have_three_digits_and_no_exponent(report: ModuleType, value: float, text: str) -> None:
    assert report.number(value) == text


def test_the_table_shows_goal_and_verdict_and_the_file_no_names_of_the_machine(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = report.Row("a", "slow", 1.0, "ms"), report.Row("b", "fast", 0.5, at_least=True)
    slow.add(3.0)
    fast.add(0.75, ours_rps=3.0, floor_rps=4.0)
    lines = report.table([slow, fast]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "slow",
        "3.00 ms",
        "3.00 .. 3.00",
        "<= 1 ms",
        "MISSED",
        "",
    ]
    assert [cell.strip() for cell in lines[3].split("|")[1:6]] == ["fast", "0.750x", "0.750 .. 0.750", ">= 0.5x", "met"]
    assert len({len(line) for line in lines}) == 1
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.save([slow, fast], "x", rounds=1, quick=True, facts=report.machine()).read_text()
    saved = json.loads(text)
    assert [(row["key"], row["value"], row["met"]) for row in saved["rows"]] == [("a", 3.0, False), ("b", 0.75, True)]
    import socket

    assert str(Path.home()) not in text
    assert socket.gethostname() not in json.dumps(list(saved["machine"].values()))


async def test_the_load_client_counts_answers_per_connection_and_events_of_a_stream() -> None:
    served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(len(BODY)) == BODY
                served += 1
                if head.startswith(b"POST /stream "):
                    event = b'event: update\nid: 0\ndata: {"sent_ns":1}\n\n'
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    writer.write(b"%x\r\n" % len(event) + event[:20])
                    await writer.drain()
                    writer.write(event[20:] + b"\r\n0\r\n\r\n")
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")
                    await writer.drain()
                    writer.write(b"llo")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def load(*options: str) -> dict[str, list[float]]:
        command = [sys.executable, "-m", "bench.http_load", "--port", str(port), "--body", BODY.decode(), *options]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=ROOT)
        out, _ = await process.communicate()
        assert process.returncode == 0
        seen: dict[str, list[float]] = json.loads(out)
        return seen

    async with server:
        seen = await load("--connections", "3", "--requests", "30", "--warmup", "0")
        assert len(seen["latencies"]) == 30
        assert len(seen["served"]) == 3
        assert sum(seen["served"]) == 30
        assert min(seen["served"]) > 0
        assert served >= 30
        seen = await load("--path", "/stream", "--requests", "4", "--warmup", "0")
        assert len(seen["firsts"]) == len(seen["delays"]) == 4
        assert all(delay > 0 for delay in seen["delays"])

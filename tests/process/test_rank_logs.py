"""Whatever a rank writes, in whatever way, is in the log with its rank and its request's id."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from drumline.distributed import DistributedRunner
from drumline.errors import RankLost
from drumline.testing.workers import Talks

pytestmark = pytest.mark.asyncio(loop_scope="module")

RANKS = 2
PLAIN = ["print", "rank_print", "descriptor", "stdio", "child", "thread"]
WAYS = [*PLAIN, "warning", "logging", "traceback", "unfinished"]


@pytest.fixture(autouse=True)
def nothing_left(nothing_more_left: None) -> None:
    """The last test costs a restart."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> AsyncIterator[DistributedRunner]:
    patch = pytest.MonkeyPatch()
    patch.delenv("PYTHONUNBUFFERED", raising=False)  # it would unbuffer C's stdio, too
    runner = DistributedRunner(Talks, world_size=RANKS, device="cpu")
    async with asyncio.timeout(50):
        await runner.start()
    patch.undo()
    yield runner
    await runner.stop()


@pytest.fixture(autouse=True)
def shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "drumline.rank")


def lines(caplog: pytest.LogCaptureFixture, tag: str = "") -> list[Any]:
    return [record for record in caplog.records if record.name == "drumline.rank" and tag in record.getMessage()]


async def talk(group: DistributedRunner, tag: str, how: str, count: int = 1) -> None:
    ticket = group.submit({"tag": tag, "how": how, "lines": count}, request_id=f"id-of-{tag}")
    await asyncio.wait_for(ticket.result(), 20)


@pytest.mark.parametrize("how", PLAIN)
async def test_a_line_is_one_record(group: DistributedRunner, caplog: pytest.LogCaptureFixture, how: str) -> None:
    await talk(group, how, how, 3)
    found = lines(caplog)
    for rank in range(RANKS):
        texts = [record.getMessage() for record in found if record.rank == rank]
        assert texts == [f"{how} rank={rank} line={number}" for number in range(3)]
    assert {record.request_id for record in found} == {f"id-of-{how}"}
    assert {record.levelno for record in found} == {logging.INFO}


async def test_a_record_of_logging_keeps_its_level_and_logger(
    group: DistributedRunner, caplog: pytest.LogCaptureFixture
) -> None:
    await talk(group, "logged", "logging")
    found = lines(caplog)
    assert [(record.rank, record.levelno, record.rank_logger) for record in sorted(found, key=lambda r: r.rank)] == [
        (rank, logging.ERROR, "some.library") for rank in range(RANKS)
    ]
    assert {record.request_id for record in found} == {"id-of-logged"}


@pytest.mark.parametrize("how", ["warning", "traceback"])
async def test_every_line_of_many_has_rank_and_id(
    group: DistributedRunner, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    await talk(group, how, how)
    found = lines(caplog)
    assert {record.request_id for record in found} == {f"id-of-{how}"}
    for rank in range(RANKS):
        text = "\n".join(record.getMessage() for record in found if record.rank == rank)
        assert f"{how} rank={rank} line=0" in text
        assert ("UserWarning" if how == "warning" else "Traceback (most recent call last)") in text
        assert f"rank={1 - rank}" not in text


async def test_an_unfinished_line_belongs_to_its_request(
    group: DistributedRunner, caplog: pytest.LogCaptureFixture
) -> None:
    for tag in ("one", "two", "three"):
        await talk(group, tag, "unfinished")
    for tag in ("one", "two", "three"):
        found = lines(caplog, tag)
        assert sorted(record.getMessage() for record in found) == [f"{tag} rank={rank} line=0" for rank in range(RANKS)]
        assert {record.request_id for record in found} == {f"id-of-{tag}"}


async def test_debug_lines_are_shown_at_debug_only(group: DistributedRunner, caplog: pytest.LogCaptureFixture) -> None:
    await talk(group, "quiet", "debug")
    assert lines(caplog, "quiet") == []
    caplog.set_level(logging.DEBUG, "drumline.rank")
    await talk(group, "loud", "debug")
    assert {(record.rank, record.levelno) for record in lines(caplog, "loud")} == {(0, 10), (1, 10)}


async def test_lines_never_carry_the_id_of_another_request(
    group: DistributedRunner, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(20)
    requests = {
        f"[{n}]": (chance.choice([way for way in WAYS if way != "child"]), chance.randrange(1, 8)) for n in range(60)
    }
    await asyncio.gather(*(talk(group, tag, how, count) for tag, (how, count) in requests.items()))
    for tag, (how, count) in requests.items():
        found = lines(caplog, f"{tag} rank=")
        assert {(record.request_id, record.rank) for record in found} == {(f"id-of-{tag}", n) for n in range(RANKS)}
        for record in found:
            assert f"rank={record.rank}" in record.getMessage()
        numbers = sorted({text.split("line=")[1].split()[0] for text in (r.getMessage() for r in found)})
        if how != "unfinished":
            assert numbers == [str(number) for number in range(count)], how


async def test_ten_thousand_lines_arrive_whole_and_in_order(
    group: DistributedRunner, caplog: pytest.LogCaptureFixture
) -> None:
    await talk(group, "many", "print", 10_000)
    for rank in range(RANKS):
        texts = [record.getMessage() for record in lines(caplog, "many ") if record.rank == rank]
        assert texts == [f"many rank={rank} line={number}" for number in range(10_000)]


async def test_the_last_words_of_a_crash(group: DistributedRunner, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RankLost):
        await talk(group, "crash", "segfault")
    said = lines(caplog, "crash rank=")
    assert {record.request_id for record in said} == {"id-of-crash"}
    dump = [record for record in lines(caplog) if "Segmentation fault" in record.getMessage()]
    assert {record.request_id for record in dump} == {"id-of-crash"}
    stack = "\n".join(record.getMessage() for record in lines(caplog) if record.rank == dump[0].rank)
    assert "in fail" in stack

"""Ranks that write anything to their channel: their request ends with an error that names them, and the group comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from drumline import protocol
from drumline.contract import RestartSettings
from drumline.distributed import DistributedRunner
from drumline.errors import RankHung, RankLost
from drumline.framing import PREFIX, NewSegment, Place, Placement, encode_placement
from drumline.testing.broken_ranks import Babbler

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECONDS = 60
FORGED = msgspec.msgpack.encode({"answer": "forged"})
pack = msgspec.msgpack.encode


def framed(header: bytes, message: bytes) -> bytes:
    return PREFIX.pack(len(header) + len(message), len(header)) + header + message


def placed(placement: Placement) -> bytes:
    return framed(encode_placement(placement), b"")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["local", "remote"])
async def group(request: pytest.FixtureRequest) -> AsyncIterator[DistributedRunner]:
    runner = DistributedRunner(
        Babbler,
        world_size=2,
        device="cpu",
        hang_timeout=10,  # for half a frame; a busy machine needs seconds for a request, too
        restart=RestartSettings(max_restarts=1000, backoff_seconds=0),
        **({"worker_addr": "127.0.0.1"} if request.param == "remote" else {}),
    )
    async with asyncio.timeout(SECONDS):
        await runner.start()
    yield runner
    await runner.stop()


@pytest.fixture(autouse=True)
def nothing_left(nothing_more_left: None) -> None:
    """The group is restarted by these tests."""


async def speaks(group: DistributedRunner, rank: int, **payload: Any) -> dict[str, Any]:
    async with asyncio.timeout(SECONDS):
        result: dict[str, Any] = await group.invoke({"rank": rank, "answer": "own", **payload})
        return result


async def ends(group: DistributedRunner, rank: int, **payload: Any) -> None:
    """The request that ``rank`` breaks fails with its name, the group is a new one, and it works."""
    before = group.status.restarts
    with pytest.raises((RankLost, RankHung)) as caught:
        await speaks(group, rank, **payload)
    assert caught.value.rank == rank
    assert await speaks(group, -1) == {"answer": "own"}
    status = group.status
    assert status.restarts == before + 1
    assert status.last_failure is not None


NO_MESSAGES = {
    "nothing": b"",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "an unknown kind": pack([99, 1, 2]),
    "a message of the runner": protocol.encode(protocol.Teardown()),
    "too few fields": pack([14]),
    "a wrong field": pack([14, "one", 2, b""]),
    "broken UTF-8": pack([15, 1, 1, ["E", "mm", "", b"", "worker"]]).replace(b"mm", b"\xff\xfe"),
    "a list without end": b"\xdd\xff\xff\xff\xff",
    "a list in a list, 100,000 times": pack([11, 1.0, "cpu", "gloo"])[:-5].replace(b"\x94", b"\x95", 1)
    + b"\xa4gloo"
    + b"\x91" * 100_000,
    "details that are none": pack([15, 1, 1, ["E", "m", "", b"\xff{", "invalid"]]),
    "two messages in one": protocol.encode(protocol.Stopped(9, 9, 9)) * 2,
}


@pytest.mark.parametrize("kind", NO_MESSAGES)
@pytest.mark.parametrize("rank", [0, 1])
async def test_what_is_no_message(group: DistributedRunner, kind: str, rank: int) -> None:
    await ends(group, rank, messages=[NO_MESSAGES[kind]])
    assert "sent what is no message" in str(group.status.last_failure)


@pytest.mark.parametrize("sequence", [0, 10**9, 2**63, 2**64 - 1, -1])
async def test_answers_to_other_requests_answer_none(group: DistributedRunner, sequence: int) -> None:
    """Neither an earlier one nor one that is still to come."""
    before = group.status.restarts
    forged: list[protocol.RankMessage] = [
        protocol.Returned(sequence, 0, FORGED),
        protocol.Update(sequence, FORGED),
        protocol.Raised(sequence, 0, protocol.Failure("E", "forged")),
        protocol.Stopped(sequence, 0, 1),
        protocol.Ready(1.0, "cpu", "gloo"),
    ]
    for rank in (0, 1):
        messages = [protocol.encode(message) for message in forged]
        assert await speaks(group, rank, messages=messages) == {"answer": "own"}
        assert await speaks(group, -1) == {"answer": "own"}
    assert group.status.restarts == before


async def test_the_next_request_is_not_answered_before_it_is_asked(group: DistributedRunner) -> None:
    """Every number that the next requests may have is answered in advance."""
    messages = [protocol.encode(protocol.Returned(number, 0, FORGED)) for number in range(2, 400)]
    # A rank may answer its own request early; what comes back is rank 0's value all the same.
    for rank in (1, -1, -1, -1):
        assert await speaks(group, rank, messages=messages) == {"answer": "own"}


STREAMS = {
    "garbage": b"\xff" * 5000,
    "a header that is longer than its frame": PREFIX.pack(10, 11) + bytes(10),
    "a frame of 4 GiB": PREFIX.pack(2**32 - 1, 0),
    "a header that is none": framed(b"\xc1", b"x"),
    "a header of lists": framed(b"\x91" * 50_000, b"x"),
    "a segment nobody sent": placed(Placement([Place(77, 0, 10)])),
    "a segment without its file": placed(Placement([Place(1, 0, 10)], [NewSegment(1, 4096)])),
    "a message in no segment": placed(Placement([], [], [], True)),
    "half a frame": PREFIX.pack(100_000, 0) + b"x",
}


@pytest.mark.parametrize("group", ["local"], indirect=True)
@pytest.mark.parametrize("kind", STREAMS)
async def test_what_is_no_frame(group: DistributedRunner, kind: str) -> None:
    await ends(group, 1, raw=STREAMS[kind])


@pytest.mark.parametrize("group", ["local"], indirect=True)
async def test_files_that_belong_to_no_frame(group: DistributedRunner) -> None:
    await ends(group, 1, descriptors=200)


MULTIPARTS = {
    "no lengths": [b"\xc1", b"x"],
    "lengths of nothing": [pack([]), b"x"],
    "a length that is too large": [pack([2**63]), b"x"],
    "a negative length": [pack([-1]), b"x"],
    "a part too few": [pack([1, 1]), b"x"],
    "a part too many": [pack([1]), b"x", b"y"],
    "a large frame": [bytes(6 << 20)],
}


@pytest.mark.parametrize("group", ["remote"], indirect=True)
@pytest.mark.parametrize("kind", MULTIPARTS)
async def test_what_is_no_message_of_several_frames(group: DistributedRunner, kind: str) -> None:
    await ends(group, 1, frames=MULTIPARTS[kind])

"""What a user of ``DistributedRunner`` may rely on while nothing goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image

from drumline import codec
from drumline.context import RequestInfo, current_request
from drumline.distributed import DistributedRunner
from drumline.errors import InvalidPayload, QueueFull, QueueTimeout, RequestCancelled, RequestTimeout
from drumline.runner.observer import Observer
from drumline.runner.ticket import IDLE, Ticket
from drumline.testing.workers import Echo, Facts, Steps

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runners() -> AsyncIterator[dict[type, DistributedRunner]]:
    """Three groups in one process, started at once."""
    made = {
        Echo: DistributedRunner(Echo, world_size=2, device="cpu"),
        Facts: DistributedRunner(Facts, world_size=2, device="cpu", revision="r7"),
        Steps: DistributedRunner(Steps, world_size=2, device="cpu", max_queue_depth=8, cancel_grace=20),
    }
    async with asyncio.timeout(50):
        await asyncio.gather(
            *(runner.start(alpha=[1, 2.5]) if cls is Facts else runner.start() for cls, runner in made.items())
        )
    yield made
    await asyncio.gather(*(runner.stop() for runner in made.values()))


@pytest.fixture
def echo(runners: dict[type, DistributedRunner]) -> DistributedRunner:
    return runners[Echo]


@pytest.fixture
def facts(runners: dict[type, DistributedRunner]) -> DistributedRunner:
    return runners[Facts]


@pytest.fixture
def steps(runners: dict[type, DistributedRunner]) -> DistributedRunner:
    return runners[Steps]


# -- values


def pixels(mode: str, size: tuple[int, int]) -> Image.Image:
    random = np.random.default_rng(3)
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, size[::-1], dtype=np.uint16))
    return Image.frombytes(mode, size, random.bytes(size[0] * size[1] * bands))


VALUES: dict[str, Any] = {
    "json": {"text": "żółć", "list": [1, 2.5, None, True], "deep": {"a": {"b": []}}},
    "bytes": b"\x00\xff" * 10,
    "big bytes": bytes(range(256)) * 4096,
    "huge int": 10**80,
    "tensor": torch.arange(12, dtype=torch.int16).reshape(3, 4),
    "bfloat16": torch.linspace(-1, 1, 7, dtype=torch.bfloat16),
    "bool tensor": torch.tensor([[True, False]]),
    "scalar tensor": torch.tensor(2.5, dtype=torch.float64),
    "empty tensor": torch.zeros(0, 3),
    "big tensor": torch.rand(3, 700, 500),
    "array": np.arange(6, dtype=">u2").reshape(2, 3),
    "complex array": np.array([1 + 2j], dtype=np.complex64),
    "big array": np.random.default_rng(1).random((400, 300)),
    "RGB": pixels("RGB", (5, 4)),
    "RGBA": pixels("RGBA", (3, 9)),
    "L": pixels("L", (7, 1)),
    "CMYK": pixels("CMYK", (2, 2)),
    "16 bit": pixels("I;16", (6, 3)),
    "big RGB": pixels("RGB", (640, 480)),
}


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and bool(np.array_equal(left, right))
    if isinstance(left, Image.Image):
        return (left.mode, left.size, left.tobytes()) == (right.mode, right.size, right.tobytes())
    return bool(left == right)


@pytest.mark.parametrize("kind", VALUES)
async def test_values_keep_type_dtype_and_pixels_both_ways(echo: DistributedRunner, kind: str) -> None:
    value = VALUES[kind]
    result = await echo.invoke({"value": value, "many": [value, {"again": value}]}, timeout=30)
    assert same(result["value"], value)
    assert same(result["many"][0], value)
    assert same(result["many"][1]["again"], value)


async def test_a_result_outlives_later_requests_and_may_be_written(echo: DistributedRunner) -> None:
    first = (await echo.invoke({"value": torch.zeros(100_000)}))["value"]
    for _ in range(3):
        other = (await echo.invoke({"value": torch.ones(100_000)}))["value"]
        other += 1
    first += 5
    assert bool((first == 5).all())
    assert bool((other == 2).all())


async def test_a_payload_may_be_changed_as_soon_as_it_was_submitted(echo: DistributedRunner) -> None:
    value = torch.zeros(100_000)
    ticket = echo.submit({"value": value, "list": [1]})
    value += 1
    packed = await ticket.result()
    assert bool((codec.unpack(packed.data, packed.buffers)["value"] == 0).all())


async def test_a_payload_that_cannot_be_carried_is_refused_at_once(echo: DistributedRunner) -> None:
    with pytest.raises(InvalidPayload, match=r"payload\.bad"):
        echo.submit({"bad": object()})
    assert await echo.invoke({"fine": 1}) == {"fine": 1}


# -- what ranks are


async def test_ranks_are_what_torchrun_would_make_them(facts: DistributedRunner) -> None:
    ranks = (await facts.invoke())["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for number, rank in enumerate(ranks):
        environment = rank["environment"]
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(number)
        assert environment["WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert 0 < int(environment["MASTER_PORT"]) < 65536
        assert rank["device"] == "cpu"
        assert rank["backend"] == "gloo"
        assert rank["main_thread"] is True
        assert rank["kwargs"] == {"alpha": [1, 2.5]}


async def test_every_rank_draws_its_own_random_numbers(facts: DistributedRunner) -> None:
    ranks = (await facts.invoke())["ranks"]
    drawn = [number for rank in ranks for number in rank["drawn"]]
    assert len(set(drawn)) == len(drawn)


async def test_status_shows_the_ranks(facts: DistributedRunner) -> None:
    ranks = (await facts.invoke())["ranks"]
    status = facts.status
    assert (status.state, status.ready_ranks, status.world_size, status.revision) == ("ready", 2, 2, "r7")
    assert [rank.pid for rank in status.ranks] == [rank["pid"] for rank in ranks]
    assert [rank.state for rank in status.ranks] == ["ready", "ready"]
    assert all((rank.rss_bytes or 0) > 1 << 20 for rank in status.ranks)
    shown = json.loads(json.dumps(status.to_dict()))
    assert shown["readyRanks"] == 2
    assert shown["ranks"][1]["rssBytes"] > 1 << 20
    assert shown["lastFailure"] is None


async def test_the_request_in_hand_is_known_to_the_worker(facts: DistributedRunner) -> None:
    token = current_request.set(RequestInfo("outer-id", "somebody", {"x-tenant": "acme"}))
    try:
        taken_over = (await facts.invoke())["ranks"]
        ticket = facts.submit({}, request_id="my-id", headers={"x-other": "1"}, timeout=30)
        packed = await ticket.result()
    finally:
        current_request.reset(token)
    own = codec.unpack(packed.data, packed.buffers)["ranks"]
    assert [rank["request_id"] for rank in taken_over] == ["outer-id"] * 2
    assert taken_over[0]["headers"] == {"x-tenant": "acme"}
    assert taken_over[0]["deadline"] is None
    assert [rank["request_id"] for rank in own] == ["my-id"] * 2
    assert own[1]["headers"] == {"x-other": "1"}
    assert own[0]["deadline"] == own[1]["deadline"] == pytest.approx(ticket.deadline)
    assert ticket.caller == "somebody"


async def test_groups_in_one_process_do_not_know_each_other(runners: dict[type, DistributedRunner]) -> None:
    echoed, told, stepped = await asyncio.gather(
        runners[Echo].invoke({"a": 1}), runners[Facts].invoke(), runners[Steps].invoke({"steps": 3})
    )
    assert echoed == {"a": 1}
    assert stepped["steps"] == 3
    pids = [rank.pid for runner in runners.values() for rank in runner.status.ranks]
    assert len(set(pids)) == 6
    assert {rank["pid"] for rank in told["ranks"]} < set(pids)


async def test_a_started_runner_cannot_be_started_again(echo: DistributedRunner) -> None:
    with pytest.raises(RuntimeError, match="ready already"):
        await echo.start()
    assert echo.is_alive()
    echo.ensure_alive()


# -- streams


async def test_a_stream_is_every_update_in_order_and_then_the_result(steps: DistributedRunner) -> None:
    *updates, result = [event async for event in steps.stream({"steps": 50, "tag": "t"}, timeout=30)]
    assert [update["step"] for update in updates] == list(range(50))
    assert {update["tag"] for update in updates} == {"t"}
    assert result["steps"] == 50


async def test_updates_of_every_rank_arrive_each_ranks_in_order(steps: DistributedRunner) -> None:
    *updates, _ = [event async for event in steps.stream({"steps": 40, "every_rank": True}, timeout=30)]
    for rank in (0, 1):
        assert [update["step"] for update in updates if update["rank"] == rank] == list(range(40))
    assert len(updates) == 80


async def test_without_a_stream_nobody_is_sent_updates(steps: DistributedRunner) -> None:
    ticket = steps.submit({"steps": 5, "every_rank": True})
    await ticket.result()
    assert await ticket.next(0) is None
    assert [update async for update in ticket.updates()] == []
    assert ticket.first_event_at is None


def parse_events(raw: bytes) -> list[tuple[str, int, Any]]:
    """As the standard says: fields per line, an empty line ends an event, comments are skipped."""
    assert raw.endswith(b"\n\n")
    events = []
    for block in raw.decode().removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if set(fields) == {""}:
            assert block == ": ping"
            continue
        assert set(fields) == {"event", "id", "data"}
        events.append((fields["event"], int(fields["id"]), json.loads(fields["data"])))
    return events


async def test_text_events_are_server_sent_events_with_one_terminal_event(steps: DistributedRunner) -> None:
    raw = b"".join([chunk async for chunk in steps.stream({"steps": 3, "tag": "a\nb"}, as_text_events=True)])
    events = parse_events(raw)
    assert [name for name, _, _ in events] == ["update"] * 3 + ["result"]
    assert [id for _, id, _ in events] == [0, 1, 2, 3]
    assert [data["step"] for _, _, data in events[:3]] == [0, 1, 2]
    assert events[-1][2]["tag"] == "a\nb"


async def test_a_failing_text_stream_ends_with_the_problem(steps: DistributedRunner) -> None:
    raw = b"".join([chunk async for chunk in steps.stream({"steps": "many"}, as_text_events=True)])
    [(name, id, problem)] = parse_events(raw)
    assert (name, id) == ("error", 0)
    assert problem["type"].endswith("/validation-error")
    assert problem["detail"][0]["loc"] == ["body", "steps"]
    assert "steps" in problem["error"]


async def test_a_silent_text_stream_has_pings(steps: DistributedRunner) -> None:
    ticket = steps.submit({"steps": 1, "seconds": 0.1}, streaming=True)
    chunks = [chunk async for chunk in ticket.text_events(keepalive=0.02)]
    assert b": ping\n\n" in chunks
    assert [name for name, _, _ in parse_events(b"".join(chunks))] == ["update", "result"]
    assert await ticket.next(0) is None


async def test_next_says_when_nothing_came(steps: DistributedRunner) -> None:
    ticket = steps.submit({"steps": 10_000, "seconds": 0.001}, streaming=True)
    waiting = steps.submit({"steps": 1}, streaming=True)
    assert await waiting.next(0.01) is IDLE
    ticket.cancel()
    assert await waiting.next(20) is not IDLE
    await waiting.wait()


async def test_a_closed_stream_cancels_its_request(steps: DistributedRunner) -> None:
    stream = steps.stream({"steps": 100_000, "seconds": 0.001})
    async for update in stream:
        assert update["step"] == 0
        break
    await stream.aclose()
    assert (await steps.invoke({"steps": 1}, timeout=20))["steps"] == 1
    assert steps.status.restarts == 0


async def test_a_reader_that_is_too_slow_is_cancelled(steps: DistributedRunner) -> None:
    steps.stream_buffer_bytes = 2000
    try:
        ticket = steps.submit({"steps": 100_000}, streaming=True)
    finally:
        steps.stream_buffer_bytes = 256 << 20
    with pytest.raises(RequestCancelled, match="too slow"):
        await ticket.result()
    numbers = [codec.unpack(u.data, u.buffers)["step"] async for u in ticket.updates()]
    assert numbers == list(range(len(numbers)))


# -- the queue


class Order(Observer):
    """Tells in which order requests were started and finished."""

    def __init__(self) -> None:
        self.started: list[Ticket] = []
        self.finished: list[Ticket] = []

    def request_started(self, ticket: Ticket) -> None:
        self.started.append(ticket)

    def request_finished(self, ticket: Ticket) -> None:
        self.finished.append(ticket)


@pytest.fixture
def order(steps: DistributedRunner) -> Any:
    observer = Order()
    steps.observers.append(observer)
    yield observer
    steps.observers.remove(observer)


async def test_callers_take_turns(steps: DistributedRunner, order: Order) -> None:
    blocker = steps.submit({"steps": 100_000, "seconds": 0.001}, caller="first")
    names = ["a", "a", "a", "a", "b", "b", "c"]
    tickets = [steps.submit({"steps": 1}, caller=name) for name in names]
    assert steps.status.queue_depth == len(names)
    blocker.cancel()
    for ticket in tickets:
        await ticket.result()
    assert [ticket.caller for ticket in order.started] == ["first", "a", "b", "c", "a", "b", "a", "a"]
    within_a = [ticket.number for ticket in order.started if ticket.caller == "a"]
    assert within_a == sorted(within_a)


async def test_one_caller_too_many_is_refused_at_once(steps: DistributedRunner) -> None:
    blocker = steps.submit({"steps": 100_000, "seconds": 0.001})
    waiting = [steps.submit({"steps": 1}) for _ in range(8)]
    with pytest.raises(QueueFull) as caught:
        await steps.invoke({"steps": 1})
    assert caught.value.depth == 8
    assert 1 <= caught.value.retry_after <= 60
    raw = b"".join([chunk async for chunk in steps.stream({"steps": 1}, as_text_events=True)])
    assert parse_events(raw)[0][2]["status"] == 429
    waiting[3].cancel()
    with pytest.raises(RequestCancelled):
        await waiting[3].result()
    late = steps.submit({"steps": 1})
    blocker.cancel()
    for ticket in (*waiting[:3], *waiting[4:], late):
        await ticket.result()


async def test_who_is_refused_is_told_when_the_queue_will_have_run(steps: DistributedRunner) -> None:
    for _ in range(60):  # these take milliseconds, so a queue of eight like them is served within the shortest wait
        await steps.invoke({"steps": 1})
    blocker = steps.submit({"steps": 100_000, "seconds": 0.001})
    waiting = [steps.submit({"steps": 1}) for _ in range(8)]
    with pytest.raises(QueueFull) as caught:
        await steps.invoke({"steps": 1})
    assert caught.value.retry_after == 1
    blocker.cancel()
    for ticket in waiting:
        await ticket.result()


async def test_a_request_that_waits_too_long_never_runs(steps: DistributedRunner, order: Order) -> None:
    blocker = steps.submit({"steps": 100_000, "seconds": 0.001})
    ticket = steps.submit({"steps": 1}, queue_timeout=0.02, timeout=30)
    other = steps.submit({"steps": 1}, timeout=0.02)
    for late in (ticket, other):
        with pytest.raises(QueueTimeout) as caught:
            await late.result()
        assert isinstance(caught.value, TimeoutError)
        assert late.outcome == "queue-timeout"
        assert late.run_time is None
        assert (late.queue_wait or 0) >= 0.02
    assert not blocker.done
    blocker.cancel()
    await blocker.wait()
    assert [t.number for t in order.started] == [blocker.number]
    assert len(order.finished) == 3


async def test_a_queue_timeout_does_not_touch_a_request_that_runs(steps: DistributedRunner) -> None:
    ticket = steps.submit({"steps": 20, "seconds": 0.005}, queue_timeout=0.01)
    await ticket.result()
    assert ticket.outcome == "ok"
    assert (ticket.run_time or 0) > 0.05


async def test_a_request_that_runs_too_long_ends_with_its_caller_and_on_the_ranks(steps: DistributedRunner) -> None:
    with pytest.raises(RequestTimeout) as caught:
        await steps.invoke({"steps": 100_000, "seconds": 0.001}, timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert (await steps.invoke({"steps": 2}))["steps"] == 2
    assert steps.status.restarts == 0


async def test_silence_in_a_stream_ends_it(steps: DistributedRunner) -> None:
    with pytest.raises(RequestTimeout, match="no update"):
        async for _ in steps.stream({"steps": 3, "seconds": 0.3}, streaming_timeout=0.05, timeout=30):
            pass
    *updates, _ = [e async for e in steps.stream({"steps": 8, "seconds": 0.01}, streaming_timeout=5, timeout=30)]
    assert len(updates) == 8


async def test_status_can_be_waited_for(steps: DistributedRunner) -> None:
    before = steps.status
    unchanged = await steps.wait_status(before.version, 0.01)
    assert unchanged.version == before.version
    waiter = asyncio.create_task(steps.wait_status(before.version, 20))
    await asyncio.sleep(0)
    with pytest.raises(RequestTimeout):
        await steps.invoke({"steps": 100_000, "seconds": 0.001}, timeout=0.01)
    assert (await waiter).version > before.version

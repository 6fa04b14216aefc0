"""Shared memory is read in place, stays valid while anything refers to it, and is used again afterwards."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from drumline import segments
from drumline.framing import NewSegment, Place, Placement
from drumline.page import create_file
from drumline.segments import PayloadPool, SegmentPool, SegmentReader


def carry(pool: SegmentPool, reader: SegmentReader, *buffers: Any) -> list[Any]:
    """Send ``buffers`` from a pool to its reader, as two processes do; the kernel duplicates the descriptor."""
    placement, descriptors = pool.place(buffers)
    received = [os.dup(descriptor) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    got = reader.read(placement, received)
    assert received == []
    return got


def hand_out(pool: PayloadPool, readers: list[SegmentReader], *buffers: Any) -> list[list[Any]]:
    """Send ``buffers`` to every reader, as a runner does to its ranks."""
    placements, descriptor = pool.place(buffers, len(readers))
    pairs = zip(readers, placements, strict=True)
    return [reader.read(placement, [os.dup(descriptor)]) for reader, placement in pairs]


def descriptors() -> list[str]:
    return sorted(os.listdir("/dev/fd"))


def segments_of(pool: SegmentPool | PayloadPool) -> int:
    return len(pool._segments)


@pytest.fixture
def pool() -> SegmentPool:
    return SegmentPool()


@pytest.fixture
def reader() -> SegmentReader:
    return SegmentReader()


# -- what arrives


def test_buffers_arrive_and_may_be_written(pool: SegmentPool, reader: SegmentReader) -> None:
    sent = [
        b"a" * 70_000,
        bytearray(b"bc"),
        memoryview(b"d" * 65),
        b"",
        np.arange(5000.0).reshape(50, 100),
        np.zeros((0, 4)),
    ]
    got = carry(pool, reader, *sent)
    assert [bytes(buffer) for buffer in got] == [bytes(memoryview(b).tobytes()) for b in sent]
    assert not any(memoryview(buffer).readonly for buffer in got)
    for buffer in got[:3]:
        memoryview(buffer).cast("B")[0] = ord("!")
    assert [bytes(buffer[:1]) for buffer in got[:3]] == [b"!"] * 3
    assert sent[0][:1] == b"a"


def test_numpy_and_torch_read_in_place(pool: SegmentPool, reader: SegmentReader) -> None:
    values = torch.arange(30_000, dtype=torch.float32)
    [buffer] = carry(pool, reader, values.numpy())
    tensor = torch.frombuffer(buffer, dtype=torch.float32)
    array = np.frombuffer(buffer, np.float32)
    assert torch.equal(tensor, values)
    tensor[0] = 77
    assert array[0] == 77, "they share the memory"
    assert tensor.data_ptr() % 64 == 0


# -- how long memory lives


def hold_view(buffer: Any) -> Any:
    return memoryview(buffer)[10:20]


def hold_array(buffer: Any) -> Any:
    return np.frombuffer(buffer, np.uint8)[5:].reshape(-1, 5)[1]


def hold_tensor(buffer: Any) -> Any:
    return torch.frombuffer(buffer, dtype=torch.uint8).view(2, -1).t()[3]


@pytest.mark.parametrize("hold", [lambda b: b, hold_view, hold_array, hold_tensor])
def test_memory_is_not_used_again_while_anything_refers_to_it(
    pool: SegmentPool, reader: SegmentReader, hold: Any
) -> None:
    held = hold(carry(pool, reader, b"\1" * 100_000)[0])
    for number in range(2, 6):
        other = carry(pool, reader, bytes([number]) * 100_000)
        del other
    assert set(np.asarray(held).view(np.uint8).ravel().tolist()) == {1}
    assert segments_of(pool) == 2
    del held
    gc.collect()
    first, second = carry(pool, reader, b"\6" * 100_000), carry(pool, reader, b"\7" * 100_000)
    assert segments_of(pool) == 2, "both are free again"
    assert [bytes(first[0][:2]), bytes(second[0][:2])] == [b"\6\6", b"\7\7"]


def test_a_frame_is_free_when_its_last_buffer_is(pool: SegmentPool, reader: SegmentReader) -> None:
    frame = carry(pool, reader, b"a" * 70_000, b"b" * 70_000, b"c" * 70_000)
    while frame:
        last = frame.pop(0)
        carry(pool, reader, b"z" * 70_000)
        assert segments_of(pool) == 2
        assert bytes(last[:1]) in b"abc"
        del last
    assert not pool._segments[0].leased
    carry(pool, reader, b"z" * 70_000)
    assert segments_of(pool) == 2


def test_memory_is_freed_by_whichever_thread_drops_it_last(pool: SegmentPool, reader: SegmentReader) -> None:
    box = [torch.frombuffer(carry(pool, reader, b"\1" * 100_000)[0], dtype=torch.uint8)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    gc.collect()
    carry(pool, reader, b"\2" * 100_000)
    assert segments_of(pool) == 1


class Cycle:
    """Refers to itself and to a result, which it reads when the garbage collector comes for all of them."""

    def __init__(self, tensor: torch.Tensor, read: list[int]) -> None:
        self.me, self.tensor, self.read = self, tensor, read

    def __del__(self) -> None:
        self.read.append(int(self.tensor.sum()))


def test_garbage_in_cycles_may_still_read_its_memory(pool: SegmentPool, reader: SegmentReader) -> None:
    read: list[int] = []
    for _ in range(20):
        buffers = carry(pool, reader, b"\1" * 100_000)
        buffers[0].cycle = buffers  # the buffer object itself is garbage in a cycle, too
        Cycle(torch.frombuffer(buffers[0], dtype=torch.uint8), read)
        del buffers
    pool.close()
    reader.close()
    gc.collect()
    assert read == [100_000] * 20


def test_what_was_received_outlives_pool_and_reader(pool: SegmentPool, reader: SegmentReader) -> None:
    [buffer] = carry(pool, reader, b"still here" * 10_000)
    pool.close()
    reader.close()
    del pool, reader
    gc.collect()
    assert bytes(buffer) == b"still here" * 10_000


@pytest.mark.linux
def test_memory_is_given_back_when_nothing_refers_to_it(pool: SegmentPool, reader: SegmentReader) -> None:
    def mapped() -> int:
        return sum("memfd:results" in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    before = mapped()
    kept = [carry(pool, reader, bytes(200_000)) for _ in range(5)]
    assert mapped() == before + 10  # each once for the sender, once for the reader
    pool.close()
    reader.close()
    gc.collect()
    assert mapped() == before + 5
    kept.clear()
    gc.collect()
    assert mapped() == before


def test_neither_end_keeps_descriptors(pool: SegmentPool, reader: SegmentReader) -> None:
    before = descriptors()
    kept = [carry(pool, reader, bytes(70_000)) for _ in range(20)]
    assert descriptors() == before
    payloads = PayloadPool()
    kept += hand_out(payloads, [reader, reader], b"x" * 1000)
    assert len(descriptors()) == len(before) + 1, "the sender's, which goes along with every payload"
    payloads.close()
    assert descriptors() == before
    assert bytes(kept[20][0]) == bytes(kept[21][0]) == b"x" * 1000


def test_surplus_memory_is_dropped_at_both_ends(
    pool: SegmentPool, reader: SegmentReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "KEPT_FREE_BYTES", 1 << 20)
    kept = [carry(pool, reader, bytes([n]) * 200_000) for n in range(12)]
    assert segments_of(pool) == 12
    del kept[::2]
    gc.collect()
    larger = carry(pool, reader, b"x" * 500_000)  # fits none of the free ones
    assert segments_of(pool) == len(reader._maps)
    free = [s for s in pool._segments if not s.leased]
    assert sum(s.size for s in free) <= 1 << 20
    assert [bytes(buffers[0]) for buffers in kept] == [bytes([n]) * 200_000 for n in range(1, 12, 2)]
    assert bytes(larger[0][:3]) == b"xxx"


def test_slightly_different_results_share_memory(pool: SegmentPool, reader: SegmentReader) -> None:
    for size in (300_000, 310_000, 420_000, 500_000, 70_000):
        carry(pool, reader, bytes(size))
    assert segments_of(pool) == 1


def test_the_smallest_segment_that_fits_is_taken(pool: SegmentPool, reader: SegmentReader) -> None:
    both = [carry(pool, reader, bytes(9 << 20)), carry(pool, reader, bytes(100_000))]
    both.clear()
    gc.collect()
    small = carry(pool, reader, bytes(100_000))
    large = carry(pool, reader, bytes(9 << 20))
    assert segments_of(pool) == 2
    assert len(small) == len(large) == 1


# -- children of a process that reads


@contextmanager
def child(work: Callable[[], object]) -> Iterator[None]:
    """Fork; the child runs ``work`` at the end of the block and must return something true."""
    wait, go = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests, which the child does not need
        pid = os.fork()
    if not pid:
        try:
            os.read(wait, 1)
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    try:
        yield
    finally:
        os.write(go, b"!")
        _, status = os.waitpid(pid, 0)
        os.close(wait)
        os.close(go)
    assert os.waitstatus_to_exitcode(status) == 0


def test_memory_that_a_child_may_read_is_never_written_again(payloads: PayloadPool, reader: SegmentReader) -> None:
    held = hand_out(payloads, [reader], b"\1" * 100_000)
    with child(lambda: set(bytes(held[0][0])) == {1}):
        held.clear()
        for number in range(2, 6):
            hand_out(payloads, [reader], bytes([number]) * 100_000)
        assert segments_of(payloads) == 1, "what was given up is not kept either"


def test_a_child_does_not_free_what_its_parent_reads(pool: SegmentPool, reader: SegmentReader) -> None:
    held = carry(pool, reader, b"\1" * 100_000)
    with child(lambda: held.clear() or True):  # type: ignore[func-returns-value]
        pass
    for number in range(2, 6):
        carry(pool, reader, bytes([number]) * 100_000)
    assert set(bytes(held[0])) == {1}
    held.clear()
    carry(pool, reader, bytes(600_000))  # fits none, so that what is given up is dropped
    assert segments_of(pool) == len(reader._maps) == 2


# -- payloads: one sender, several readers, each of which may write


@pytest.fixture
def payloads() -> PayloadPool:
    return PayloadPool()


@pytest.fixture
def readers() -> list[SegmentReader]:
    return [SegmentReader(), SegmentReader(), SegmentReader()]


def test_readers_of_the_same_payload_do_not_see_each_others_changes(
    payloads: PayloadPool, readers: list[SegmentReader]
) -> None:
    first, second, third = hand_out(payloads, readers, b"a" * 100_000, b"bb")
    torch.frombuffer(first[0], dtype=torch.uint8).fill_(9)
    assert bytes(second[0]) == bytes(third[0]) == b"a" * 100_000
    assert bytes(first[1]) == bytes(second[1]) == b"bb"
    kept = np.frombuffer(second[0], np.uint8)
    del first, second, third
    readers.clear()
    payloads.close()
    gc.collect()
    assert set(kept.tolist()) == {ord("a")}


def test_a_payload_takes_memory_that_every_reader_has_let_go(
    payloads: PayloadPool, readers: list[SegmentReader]
) -> None:
    got = hand_out(payloads, readers, b"\1" * 100_000, b"\2" * 70_000)
    while got:
        hand_out(payloads, readers, b"\3" * 100_000)
        assert segments_of(payloads) == 2
        assert [set(bytes(part)) for part in got[-1]] == [{1}, {2}]
        del got[-1][0]
        assert payloads._segments[0].leased
        got.pop()
    assert not payloads._segments[0].leased
    both = [hand_out(payloads, readers, bytes([number]) * 100_000) for number in (4, 5)]
    assert segments_of(payloads) == 2
    assert [{bytes(part[:1]) for [part] in got} for got in both] == [{b"\4"}, {b"\5"}]


def test_what_a_reader_wrote_is_gone_with_its_payload(payloads: PayloadPool, readers: list[SegmentReader]) -> None:
    for number in range(1, 5):
        for [buffer] in hand_out(payloads, readers, bytes([number]) * 300_000):
            assert set(bytes(buffer)) == {number}
            np.frombuffer(buffer, np.uint8)[:] = 99
            del buffer
    assert segments_of(payloads) == 1


@pytest.mark.parametrize("sizes", [[10], [4096], [4097], [65, 1], [1, 64, 8191], [0], [0, 3, 0]])
def test_a_short_payload_shows_nothing_of_a_longer_one_before(
    payloads: PayloadPool, readers: list[SegmentReader], sizes: list[int]
) -> None:
    hand_out(payloads, readers, b"secret" * 50_000)
    placements, descriptor = payloads.place([b"." * size for size in sizes], len(readers))
    assert segments_of(payloads) == 1
    for placement in placements:
        [new] = placement.new
        mapped = segments._map_private(os.dup(descriptor), new.size)
        assert set(mapped[segments.HEADER :]) <= set(b".\0")
        assert len(mapped) - segments.HEADER - sum(sizes) < 2 * mmap.PAGESIZE


def test_payloads_that_are_kept_for_ever(payloads: PayloadPool, readers: list[SegmentReader]) -> None:
    before = descriptors()
    kept = [hand_out(payloads, readers, bytes([number]) * 70_000) for number in range(40)]
    assert segments_of(payloads) == segments.MOST_PAYLOADS
    assert len(descriptors()) == len(before) + segments.MOST_PAYLOADS
    for number in range(40, 45):
        hand_out(payloads, readers, bytes([number]) * 70_000)
    for number, got in enumerate(kept):
        assert [set(bytes(buffer)) for [buffer] in got] == [{number}] * 3
    kept.clear()
    got = hand_out(payloads, readers, b"." * 70_000)
    assert bytes(got[2][0]) == b"." * 70_000


def test_no_more_free_memory_is_kept_than_may_be(
    payloads: PayloadPool, readers: list[SegmentReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "KEPT_FREE_BYTES", 1 << 20)
    kept = [hand_out(payloads, readers, bytes(200_000 + number)) for number in range(7)]
    kept.clear()
    hand_out(payloads, readers, bytes(100))
    hand_out(payloads, readers, bytes(100))
    assert sum(s.size for s in payloads._segments if not s.leased) <= (1 << 20) + payloads._segments[0].size


@pytest.mark.linux
def test_a_payload_is_written_without_a_page_fault_per_page(payloads: PayloadPool) -> None:
    data = np.ones(16 << 20, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    payloads.place([data], 1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < data.nbytes // resource.getpagesize() // 10


def test_a_payload_that_cannot_be_written_leaves_nothing(
    payloads: PayloadPool, readers: list[SegmentReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = os.listdir("/dev/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            payloads.place([b"a"], 1)
    assert segments_of(payloads) == 0
    assert os.listdir("/dev/fd") == before
    assert bytes(hand_out(payloads, readers, b"b")[2][0]) == b"b"


def test_a_payload_of_nothing(payloads: PayloadPool, reader: SegmentReader) -> None:
    [[left, right]] = hand_out(payloads, [reader], b"", b"")
    assert len(left) == len(right) == 0


def test_more_readers_than_a_header_has_words_for(payloads: PayloadPool) -> None:
    with pytest.raises(ValueError, match="words for 512 readers, not for 513"):
        payloads.place([b"a"], 513)


@pytest.mark.linux
def test_a_reader_cannot_make_the_senders_memory_shorter(payloads: PayloadPool) -> None:
    _, descriptor = payloads.place([bytes(100_000)], 1)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)


# -- what cannot be


def file_of(size: int) -> int:
    return create_file("segment-test", size)


@pytest.mark.parametrize(
    ("placement", "files", "words"),
    [
        (Placement([Place(5, 0, 1)]), 0, "segment 5 is not known"),
        (Placement([Place(1, 4000, 200)], [NewSegment(1, 4096)]), 1, "too small"),
        (Placement([Place(1, -8, 8)], [NewSegment(1, 4096)]), 1, "too small"),
        (Placement([Place(1, 8, -8)], [NewSegment(1, 4096)]), 1, "too small"),
        (Placement([Place(1, 1 << 62, 1)], [NewSegment(1, 4096)]), 1, "too small"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 4096)]), 0, "without its descriptor"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 4096), NewSegment(2, 4096)]), 1, "without its descriptor"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 1 << 30)]), 1, "is not what was sent"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 0)]), 1, "is not what was sent"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, -1)]), 1, "is not what was sent"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 4096)], dropped=[1]), 1, "segment 1 is not known"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 4096, True)]), 1, "is not what was sent"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 8192, True)]), 1, "is not what was sent"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 4096, True, -1)]), 1, "has no word -1"),
        (Placement([Place(1, 0, 1)], [NewSegment(1, 4096, True, 512)]), 1, "has no word 512"),
    ],
)
def test_frames_that_cannot_be_are_refused_and_leave_nothing(
    reader: SegmentReader, placement: Placement, files: int, words: str
) -> None:
    before = descriptors()
    received = [file_of(4096) for _ in range(files)]
    with pytest.raises(ValueError, match=words):
        reader.read(placement, received)
    assert descriptors() == before


# -- anything in any order


class Traffic(RuleBasedStateMachine):
    """Frames are sent, held and dropped in any order: what is held never changes, what is free is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.reader = SegmentPool(), SegmentReader()
        self.held: list[tuple[int, list[Any]]] = []
        self.number = 0
        self.most = 0

    @rule(sizes=st.lists(st.integers(0, 600_000), min_size=1, max_size=3))
    def send(self, sizes: list[int]) -> None:
        self.number = self.number % 250 + 1
        buffers = carry(self.pool, self.reader, *[bytes([self.number]) * size for size in sizes])
        assert [len(buffer) for buffer in buffers] == sizes
        self.held.append((self.number, [np.frombuffer(b, np.uint8) if len(b) else b for b in buffers]))
        self.most = max(self.most, len(self.held))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.held:
            at = data.draw(st.integers(0, len(self.held) - 1))
            frame = self.held[at][1]
            frame.pop(data.draw(st.integers(0, len(frame) - 1)))
            if not frame:
                del self.held[at]

    @invariant()
    def what_is_held_is_as_it_was_sent(self) -> None:
        for number, frame in self.held:
            for array in frame:
                if len(array):
                    assert array[0] == array[-1] == array[len(array) // 2] == number

    @invariant()
    def what_is_free_is_used_again(self) -> None:
        assert sum(s.leased for s in self.pool._segments) == len(self.held)
        # At most one segment per held frame and class of sizes.
        assert segments_of(self.pool) <= 3 * max(self.most, 1)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=30, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
TestTraffic.pytestmark = [pytest.mark.timeout(20)]


class Payloads(RuleBasedStateMachine):
    """Payloads are sent to several readers, written to, held and dropped in any order; nobody sees another's bytes."""

    READERS = 3

    def __init__(self) -> None:
        super().__init__()
        self.pool = PayloadPool()
        self.readers = [SegmentReader() for _ in range(self.READERS)]
        self.held: list[tuple[int, list[Any]]] = []
        self.number = 0

    @rule(sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=3))
    def send(self, sizes: list[int]) -> None:
        self.number = self.number % 250 + 1
        for got in hand_out(self.pool, self.readers, *[bytes([self.number]) * size for size in sizes]):
            assert [len(buffer) for buffer in got] == sizes
            self.held.append((self.number, [np.frombuffer(buffer, np.uint8) for buffer in got]))
        self.what_is_held_is_what_was_sent_or_written()

    @rule(data=st.data(), value=st.integers(1, 250))
    def write(self, data: st.DataObject, value: int) -> None:
        if self.held:
            at = data.draw(st.integers(0, len(self.held) - 1))
            for array in self.held[at][1]:
                array[:] = value
            self.held[at] = (value, self.held[at][1])

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.held:
            frame = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))[1]
            while frame:
                frame.pop()

    @invariant()
    def what_is_held_is_what_was_sent_or_written(self) -> None:
        for number, frame in self.held:
            for array in frame:
                assert array.min() == array.max() == number

    @invariant()
    def the_pool_is_bounded(self) -> None:
        assert segments_of(self.pool) <= segments.MOST_PAYLOADS
        assert self.held or not any(s.leased for s in self.pool._segments)


TestPayloads = Payloads.TestCase
TestPayloads.settings = settings(
    max_examples=30, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
TestPayloads.pytestmark = [pytest.mark.timeout(20)]

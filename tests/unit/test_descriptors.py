"""Descriptors arrive over a Unix socket in order, as this process's own, and are not passed on by accident."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from drumline import descriptors


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, ancillary, _, _ = sock.recvmsg(100, descriptors.ANCILLARY)
    return data, descriptors.received(ancillary)


def test_descriptors_arrive_in_order_and_are_not_inheritable(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    pipes = [os.pipe() for _ in range(5)]
    sent = [writer for _, writer in pipes]
    socket.send_fds(left, [b"five"], sent)
    data, got = receive(right)
    assert data == b"five"
    assert len(got) == 5
    assert not set(got) & set(sent)
    for number, descriptor in enumerate(got):
        assert not os.get_inheritable(descriptor)
        os.write(descriptor, bytes([number]))
        os.close(descriptor)
    for number, (reader, writer) in enumerate(pipes):
        os.close(writer)
        assert os.read(reader, 10) == bytes([number])
        assert os.read(reader, 10) == b"", "somebody still holds the writing end"
        os.close(reader)


def test_as_many_as_a_read_has_room_for(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    socket.send_fds(left, [b"x"], [left.fileno()] * 32)
    _, got = receive(right)
    assert len(set(got)) == 32
    for descriptor in got:
        os.close(descriptor)


def test_nothing_but_data(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    left.send(b"plain")
    assert receive(right) == (b"plain", [])


def test_other_ancillary_data_is_not_taken_for_descriptors() -> None:
    assert (
        descriptors.received([(socket.SOL_SOCKET, 0x7777, b"\1\0\0\0"), (0x7777, socket.SCM_RIGHTS, b"\1\0\0\0")]) == []
    )

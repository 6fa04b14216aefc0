"""Who must not get into a channel, and what a ZeroMQ channel does about addresses, keys and peers that vanish."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
import pytest_asyncio
import zmq
from zmq.utils import z85

from drumline.errors import ConfigurationError
from drumline.runner.channel import remote
from drumline.runner.channel.local import LocalChannel
from drumline.runner.channel.port import RankEnd
from drumline.runner.channel.remote import RemoteChannel
from drumline.testing.channel_group import ChannelGroup, encode

SECONDS = 40
LOG = "drumline.runner.channel"
EVENT = struct.Struct("=HI")
#: What the other side of a handshake may say, but not that it succeeded.
REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


@pytest_asyncio.fixture
async def group() -> AsyncIterator[ChannelGroup]:
    """Two ranks that are connected, and a third whose process nobody has started."""
    channel = RemoteChannel(3)
    made = ChannelGroup(channel, 2)
    try:
        async with asyncio.timeout(SECONDS):
            await made.ask(0, "echo")
            await made.ask(1, "echo")
            yield made
    finally:
        await made.close()


async def works(group: ChannelGroup) -> None:
    for rank in (0, 1):
        assert await group.ask(rank, "echo", [b"x" * 100_000], number=rank) == (
            {"do": "echo", "number": rank},
            [b"x" * 100_000],
        )
    assert group.closed == []
    assert not any(group.received.values())


class Client:
    """A ZeroMQ client that somebody else has written."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], end: RankEnd, identity: bytes, *, curve: bool) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if identity:
            self.socket.setsockopt(zmq.ROUTING_ID, identity)
        if curve:
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, end.server_key.encode())
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, end.public_key.encode())
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, end.secret_key.encode())
        self.monitor = self.socket.get_monitor_socket()
        self.socket.connect(end.address)

    async def outcome(self) -> int:
        """Wait for the end of the handshake, or of the connection."""
        while True:
            frames = await asyncio.to_thread(self.monitor.recv_multipart)
            event: int = EVENT.unpack(frames[0])[0]
            if event & (REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED):
                return event


Connect = Callable[..., Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make clients, and close them in the end."""
    context = zmq.Context()
    clients: list[Client] = []

    def made(end: RankEnd, identity: bytes = b"", *, curve: bool = True) -> Client:
        clients.append(Client(context, end, identity, curve=curve))
        return clients[-1]

    yield made
    for client in clients:
        client.socket.disable_monitor()
        client.monitor.close(linger=0)
        client.socket.close(linger=0)
    context.term()


def own_keys(end: RankEnd) -> RankEnd:
    public, secret = zmq.curve_keypair()
    return RankEnd(None, end.address, end.server_key, public.decode(), secret.decode())


def identity_of(end: RankEnd) -> bytes:
    identity: bytes = z85.decode(end.public_key)
    return identity


# -- ZeroMQ: who is refused


def knock(socket: zmq.Socket[bytes]) -> None:
    """Send something; a socket that was refused already has nobody to send it to, and would wait for ever."""
    with suppress(zmq.Again):
        socket.send(b"", zmq.DONTWAIT)


async def test_a_client_without_keys_is_refused(group: ChannelGroup, connect: Connect) -> None:
    client = connect(group.channel.rank_end(2), identity_of(group.channel.rank_end(2)), curve=False)
    knock(client.socket)
    assert await client.outcome() & REFUSED
    await works(group)


async def test_a_client_that_was_not_invited_is_refused(
    group: ChannelGroup, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    end = group.channel.rank_end(2)
    for _ in range(3):
        client = connect(own_keys(end), identity_of(end))
        knock(client.socket)
        assert await client.outcome() == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    await works(group)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.getMessage() for r in warnings] == ["refused a connection from 127.0.0.1: its key is not that of a rank"]


async def test_a_client_that_takes_another_server_for_the_runner_gets_nowhere(
    group: ChannelGroup, connect: Connect
) -> None:
    end = group.channel.rank_end(2)
    foreign = RankEnd(None, end.address, zmq.curve_keypair()[0].decode(), end.public_key, end.secret_key)
    client = connect(foreign)
    assert await client.outcome() & REFUSED
    await works(group)


async def test_a_key_is_good_for_one_connection(group: ChannelGroup, connect: Connect) -> None:
    for rank in (0, 2):
        end = group.channel.rank_end(rank)
        outcomes = [await connect(end).outcome() for _ in range(2)]
        assert outcomes[-1] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        assert (outcomes[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED) == (rank == 2)
    await works(group)


@pytest.mark.parametrize("claimed", [0, 1])
async def test_a_rank_cannot_speak_for_another(
    group: ChannelGroup, connect: Connect, caplog: pytest.LogCaptureFixture, claimed: int
) -> None:
    client = connect(group.channel.rank_end(2), identity_of(group.channel.rank_end(claimed)))
    assert await client.outcome() == zmq.EVENT_HANDSHAKE_SUCCEEDED
    client.socket.send(b"")
    client.socket.send(encode({"forged": True}))
    await works(group)
    # What is meant for the rank does not go to the one who claims to be it.
    group.tell(claimed, "echo", secret=1)
    [(answer, _)] = await group.take(claimed)
    assert answer["secret"] == 1
    assert not client.socket.poll(0)
    assert group.closed == []


async def test_a_rank_cannot_speak_for_one_that_has_not_come(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    group = ChannelGroup(RemoteChannel(2), 0)
    warned = asyncio.Event()
    handler = logging.Handler()
    handler.emit = lambda _: warned.set()  # type: ignore[method-assign]
    logging.getLogger(LOG).addHandler(handler)
    try:
        async with asyncio.timeout(SECONDS):
            client = connect(group.channel.rank_end(1), identity_of(group.channel.rank_end(0)))
            client.socket.send(b"")
            client.socket.send(encode({"forged": True}))
            await warned.wait()
            group.tell(0, "echo", secret=1)
            client.socket.send(b"")
            assert not any(group.received.values())
            assert not client.socket.poll(0)
            assert "rank 1 that named another rank" in caplog.text
    finally:
        logging.getLogger(LOG).removeHandler(handler)
        await group.close()


async def test_a_rank_that_sends_what_is_no_message_is_lost_and_nobody_else(
    group: ChannelGroup, connect: Connect
) -> None:
    end = group.channel.rank_end(2)
    client = connect(end, identity_of(end))
    client.socket.send(b"")
    client.socket.send_multipart([b"\x93\x01\x02\x03", b"not", b"what", b"was said"])
    await group.until(lambda: group.closed == [2])
    client.socket.send(encode({"late": True}))
    group.closed.clear()
    await works(group)


async def test_a_rank_that_does_not_greet_is_lost(group: ChannelGroup, connect: Connect) -> None:
    end = group.channel.rank_end(2)
    client = connect(end, identity_of(end))
    client.socket.send(encode({"early": True}))
    await group.until(lambda: group.closed == [2])
    group.closed.clear()
    await works(group)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
GARBAGE = {
    "nothing": b"",
    "bytes": bytes(range(256)) * 300,
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "old ZMTP": b"\x01\x00",
    "another mechanism": GREETING.replace(b"CURVE", b"PLAIN"),
    "a frame of 2**62 bytes": GREETING + b"\x06" + (1 << 62).to_bytes(8, "big") + bytes(5000),
    "a frame of 1 GiB": GREETING + b"\x06" + (1 << 30).to_bytes(8, "big") + bytes(5000),
    "a wrong hello": GREETING + b"\x04\xc8" + b"\x05HELLO" + bytes(194),
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_is_hung_up_on(group: ChannelGroup, kind: str) -> None:
    port = int(group.channel.rank_end(0).address.rpartition(":")[2])
    before = psutil.Process().memory_info().rss
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GARBAGE[kind])
    if kind == "nothing":
        writer.close()
    await works(group)
    if kind not in {"nothing", "old ZMTP"}:  # half a greeting is waited for, for ZeroMQ's 30 s
        with suppress(ConnectionResetError):
            async with asyncio.timeout(15):
                await reader.read()
    writer.close()
    assert psutil.Process().memory_info().rss - before < 100 << 20
    await works(group)


async def test_many_connections_come_and_go_and_leave_nothing(group: ChannelGroup) -> None:
    port = int(group.channel.rank_end(0).address.rpartition(":")[2])
    before = len(os.listdir("/dev/fd"))
    for _ in range(30):
        pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
        for _, writer in pairs:
            writer.write(secrets.token_bytes(100))
        for reader, writer in pairs:
            with suppress(ConnectionResetError):
                await reader.read()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
    await works(group)
    assert len(os.listdir("/dev/fd")) == before


# -- ZeroMQ: ranks that come late, or go without a word


async def test_messages_wait_for_a_rank_that_comes_late(connect: Connect) -> None:
    channel = RemoteChannel(1)
    group = ChannelGroup(channel, 0)
    try:
        async with asyncio.timeout(SECONDS):
            for number in range(remote.LONGEST_WAIT):
                group.tell(0, "echo", [bytes([number]) * 100_000], number=number)
            end = channel.rank_end(0)
            client = connect(end, identity_of(end))
            client.socket.send(b"")
            for number in range(remote.LONGEST_WAIT):
                frames = await asyncio.to_thread(client.socket.recv_multipart)
                assert frames[1:] == [encode({"do": "echo", "number": number}), bytes([number]) * 100_000]
    finally:
        await group.close()


async def test_a_rank_that_comes_and_goes_while_the_runner_is_busy() -> None:
    channel = RemoteChannel(2)
    group = ChannelGroup(channel, 0)
    context = zmq.Context()
    try:
        async with asyncio.timeout(SECONDS):
            await asyncio.sleep(0)
            # The loop does not run from here on, but for the one answer that lets the client in.
            client = Client(context, channel.rank_end(0), identity_of(channel.rank_end(0)), curve=True)
            assert channel._zap.poll(10_000)
            channel._admit()
            client.socket.send(b"")
            for number in range(5):
                client.socket.send(encode({"number": number}))
            client.socket.disable_monitor()
            client.monitor.close(linger=0)
            client.socket.close(linger=10_000)
            context.term()  # everything has left
            assert channel._monitor.poll(10_000)
            channel._follow_connections()  # accepted, if not more
            await group.until(lambda: group.closed == [0])
            assert [message["number"] for message, _ in group.received[0]] == list(range(5))
    finally:
        await group.close()


async def test_no_more_than_so_many_messages_wait(group: ChannelGroup, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(remote.LONGEST_WAIT):
        group.tell(2, "echo")
    assert group.closed == []
    group.tell(2, "echo")
    assert group.closed == [2]
    assert "64 messages wait for rank 2" in caplog.text
    group.closed.clear()
    await works(group)


async def test_a_peer_that_vanishes_is_noticed() -> None:
    channel = RemoteChannel(2, vanished_after=0.5)
    group = ChannelGroup(channel, 2)
    try:
        async with asyncio.timeout(SECONDS):
            await group.ask(0, "echo")
            await group.ask(1, "echo")
            group.processes[0].send_signal(
                signal.SIGSTOP
            )  # as if its host were gone: no word, no end of the connection
            await group.until(lambda: group.closed == [0])
            await group.ask(1, "echo")
    finally:
        await group.close()


async def test_a_busy_peer_has_not_vanished() -> None:
    channel = RemoteChannel(1, vanished_after=0.3)
    group = ChannelGroup(channel, 1)
    try:
        async with asyncio.timeout(SECONDS):
            await group.ask(0, "echo")
            group.tell(0, "pause")
            assert await group.line(0) == "paused"
            # Its main thread does nothing for several times the limit; its connection answers all the same.
            end = group.channel.rank_end(0)
            watched = asyncio.create_task(group.until(lambda: bool(group.closed)))
            done, _ = await asyncio.wait([watched], timeout=1.5)
            assert not done, end
            watched.cancel()
            group.resume(0)
            await group.ask(0, "echo")
    finally:
        await group.close()


# -- ZeroMQ: addresses and keys


@pytest.mark.parametrize(
    ("address", "reachable"),
    [
        ("127.0.0.1", "tcp://127.0.0.1:"),
        ("localhost", "tcp://"),
        ("0.0.0.0", "tcp://127.0.0.1:"),
        ("", "tcp://127.0.0.1:"),
    ],
)
async def test_where_it_listens(address: str, reachable: str) -> None:
    channel = RemoteChannel(1, *([address] if address else []))
    group = ChannelGroup(channel, 1)
    try:
        async with asyncio.timeout(SECONDS):
            assert channel.rank_end(0).address.startswith(reachable)
            await group.ask(0, "echo")
    finally:
        await group.close()


@pytest.mark.ipv6
async def test_ipv6() -> None:
    channel = RemoteChannel(1, "::1")
    group = ChannelGroup(channel, 1)
    try:
        async with asyncio.timeout(SECONDS):
            assert channel.rank_end(0).address == f"tcp://[::1]:{channel.port}"
            await group.ask(0, "echo")
    finally:
        await group.close()


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_addresses_that_cannot_be_used_are_named_with_a_cure() -> None:
    before = sorted(os.listdir("/dev/fd"))
    with taken_port() as port, pytest.raises(ConfigurationError, match=rf"worker_port: {port} is in use on 127.0.0.1"):
        RemoteChannel(1, "127.0.0.1", port)
    with pytest.raises(ConfigurationError, match=r"worker_addr: 192\.0\.2\.7 is not an address of this machine"):
        RemoteChannel(1, "192.0.2.7")
    with pytest.raises(ConfigurationError, match=r"worker_addr: 'no\.such\.host\.invalid' is no IP address"):
        RemoteChannel(1, "no.such.host.invalid")
    assert sorted(os.listdir("/dev/fd")) == before


async def test_a_port_is_free_again_as_soon_as_the_channel_is_closed() -> None:
    port = None
    for _ in range(5):
        channel = RemoteChannel(1, "127.0.0.1", port)
        assert port in {None, channel.port}
        port = channel.port
        group = ChannelGroup(channel, 1)
        try:
            async with asyncio.timeout(SECONDS):
                await group.ask(0, "echo", [b"x" * 100_000])
                for _ in range(50):
                    group.tell(0, "echo", [b"x" * (1 << 20)])  # still on its way when it closes
        finally:
            channel.close()
        await group.close()


def test_every_incarnation_and_every_rank_has_keys_of_its_own() -> None:
    channels = [RemoteChannel(3), RemoteChannel(3)]
    try:
        ends = [channel.rank_end(rank) for channel in channels for rank in range(3)]
        assert len({end.server_key for end in ends}) == 2
        assert len({end.public_key for end in ends}) == len({end.secret_key for end in ends}) == 6
        assert len({end.address for end in ends}) == 2
    finally:
        for channel in channels:
            channel.close()


# -- socket pairs: nobody can even try


async def test_a_local_channel_has_no_address() -> None:
    group = ChannelGroup(LocalChannel(2), 2)
    try:
        async with asyncio.timeout(SECONDS):
            await group.ask(0, "echo")
            await group.ask(1, "echo")
            for pid in (os.getpid(), *(process.pid for process in group.processes)):
                process = psutil.Process(pid)
                assert [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN] == []
                assert [c.laddr for c in process.net_connections("unix") if c.laddr] == []
    finally:
        await group.close()

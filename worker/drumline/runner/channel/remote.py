"""Remote channel: ranks that reach the runner over TCP, through ZeroMQ with CURVE (encrypted, both sides authenticated).

Every incarnation has new keys: one pair for the runner, one per rank. A rank's key is admitted once, so that a connection
cannot be repeated with it, and each message must come from the connection whose key belongs to the rank that it claims to
be: no rank speaks for another. The routing identity of a rank is its public key, which nobody else is told.

The sockets' descriptors sit in the event loop. They signal changes, not states: whoever touches a socket looks for what
has arrived meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import struct
import time
from collections.abc import Callable, Sequence

import zmq
from typing_extensions import Buffer
from zmq.utils import z85

from drumline import multipart
from drumline.errors import ConfigurationError
from drumline.runner.channel.port import OnClosed, OnMessage, RankEnd

log = logging.getLogger("drumline.runner.channel")

#: Messages that may wait for a rank that has not connected yet; the runner sends one, and at most a second to stop it.
LONGEST_WAIT = 64
#: Unread messages per rank before the network, and then the rank, has to wait.
_UNREAD_MESSAGES = 64
#: Messages delivered before the rest of the program has its turn.
_BURST = 128
#: What a rank had sent when its process ended is a few megabytes in the kernel; reading that takes milliseconds.
_LAST_WORDS_SECONDS = 1.0
#: A peer on another host that sends nothing for so long has vanished. On this host the kernel tells at once.
VANISHED_SECONDS = 60.0
_EVENT = struct.Struct("=HI")
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
# Plain numbers: combining enum members costs as much as sending a message.
_NOW = int(zmq.DONTWAIT)
_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)


class _Peer:
    """What is known of one rank's connection."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = str(rank)
        public, secret = zmq.curve_keypair()
        self.public_key, self.secret_key = public.decode(), secret.decode()
        self.identity: bytes = z85.decode(public)
        self.connected = False
        self.closed = False
        self.descriptor = -1
        self.waiting: list[list[zmq.Frame]] = []


class RemoteChannel:
    """A listening ZeroMQ socket for ``world_size`` ranks of one incarnation.

    Args:
        world_size: number of ranks.
        address: where to listen: an IP address of this machine, or a host name of it; ``0.0.0.0`` or ``::`` for all.
        port: TCP port; None or 0 picks a free one.
        vanished_after: seconds without a sign of life after which a connection is closed; None for
            ``VANISHED_SECONDS``, or for no such limit when ``address`` is loopback.

    Raises:
        ConfigurationError: the address is not one of this machine, or the port is taken.
    """

    def __init__(
        self,
        world_size: int,
        address: str = "127.0.0.1",
        port: int | None = None,
        *,
        vanished_after: float | None = None,
    ) -> None:
        host = _resolve(address)
        if vanished_after is None and not host.is_loopback:
            vanished_after = VANISHED_SECONDS
        self._peers = [_Peer(rank) for rank in range(world_size)]
        self._by_identity = {peer.identity: peer for peer in self._peers}
        self._admissible = dict(self._by_identity)
        self._by_descriptor: dict[int, _Peer] = {}
        self._descriptors: set[int] = set()
        self._ending: list[_Peer] = []
        self._warned = False
        self._closed = False
        self._scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: OnMessage
        self._on_closed: OnClosed
        # A context of its own: ZeroMQ asks one authenticator per context, and termination must not wait for others.
        self._context = zmq.Context(1)
        try:
            self._zap = self._context.socket(zmq.REP)
            self._zap.bind(_ZAP_ADDRESS)
            self._router = self._listen(host, port or 0, vanished_after)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise _unusable(address, port, error) from None
        except BaseException:
            self._context.destroy(linger=0)
            raise
        bound = self._router.get_string(zmq.LAST_ENDPOINT)
        self.port = int(bound.rpartition(":")[2])
        reachable = ipaddress.ip_address("127.0.0.1" if host.version == 4 else "::1") if host.is_unspecified else host
        self.address = f"tcp://{_in_endpoint(reachable)}:{self.port}"

    def _listen(
        self, host: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, vanished_after: float | None
    ) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        public, secret = zmq.curve_keypair()
        self._server_key = public.decode()
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, secret)
        router.setsockopt(zmq.ZAP_DOMAIN, b"drumline")
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error for a rank that is gone, where nothing would be said
        router.setsockopt(zmq.SNDHWM, 0)
        router.setsockopt(zmq.RCVHWM, _UNREAD_MESSAGES)
        router.setsockopt(zmq.MAXMSGSIZE, multipart.LARGEST_FRAME)
        router.setsockopt(zmq.IPV6, int(host.version == 6))
        if vanished_after is not None:
            milliseconds = max(int(vanished_after * 1000), 1)
            router.setsockopt(zmq.HEARTBEAT_IVL, max(milliseconds // 4, 1))
            router.setsockopt(zmq.HEARTBEAT_TIMEOUT, milliseconds)
            router.setsockopt(zmq.HEARTBEAT_TTL, milliseconds)
        router.monitor("inproc://connections", zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._monitor = self._context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.connect("inproc://connections")
        router.bind(f"tcp://{_in_endpoint(host)}:{port or '*'}")
        return router

    # -- the port

    def open(self, on_message: OnMessage, on_closed: OnClosed) -> None:
        """See the port."""
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_closed = on_message, on_closed
        for sock, react in self._reactions():
            self._loop.add_reader(sock.fileno(), react)
            self._loop.call_soon(react)

    def _reactions(self) -> list[tuple[zmq.Socket[bytes], Callable[[], None]]]:
        return [(self._router, self._read), (self._monitor, self._follow_connections), (self._zap, self._admit)]

    def rank_end(self, rank: int) -> RankEnd:
        """See the port."""
        peer = self._peers[rank]
        return RankEnd(
            address=self.address, server_key=self._server_key, public_key=peer.public_key, secret_key=peer.secret_key
        )

    def release_rank_end(self, rank: int) -> None:
        """See the port; there is nothing to release."""

    def send(self, ranks: Sequence[int], message: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """See the port."""
        if self._closed:
            return
        # Copied once, here, into memory that all connections share: the caller may change its buffers afterwards.
        frames = [zmq.Frame(frame, copy=True) for frame in multipart.cut(message, buffers)]
        for rank in ranks:
            peer = self._peers[rank]
            if peer.closed:
                continue
            if peer.connected:
                self._transmit(peer, frames)
            else:
                self._keep(peer, frames)
        self._look_again()

    def drain(self, rank: int) -> None:
        """See the port. Waits until the connection's end has been seen, which is milliseconds away, at most a second."""
        self._follow_connections()
        peer = self._peers[rank]
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while peer.connected and not peer.closed and not self._closed:
            left = deadline - time.monotonic()
            if left <= 0:
                log.warning("rank %d ended, but its connection has not", rank)
                break
            zmq.zmq_poll([(self._monitor, zmq.POLLIN), (self._router, zmq.POLLIN)], int(left * 1000) + 1)
            self._follow_connections()
            self._read_what_waits()
        self._look_again()

    def close(self) -> None:
        """See the port."""
        if self._closed:
            return
        self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            for sock, _ in self._reactions():
                self._loop.remove_reader(sock.fileno())
        for peer in self._peers:
            peer.waiting.clear()
        self._router.disable_monitor()
        # Nothing lingers, so this takes a fraction of a millisecond; the port is free afterwards.
        self._context.destroy(linger=0)

    # -- out

    def _transmit(self, peer: _Peer, frames: list[zmq.Frame]) -> None:
        send = self._router.send
        try:
            send(peer.identity, _MORE)
            for frame in frames[:-1]:
                send(frame, _MORE, copy=False)
            send(frames[-1], _NOW, copy=False)
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            # its end is on the way and tells the story

    def _keep(self, peer: _Peer, frames: list[zmq.Frame]) -> None:
        if len(peer.waiting) < LONGEST_WAIT:
            peer.waiting.append(frames)
            return
        log.error("%d messages wait for rank %d, which has not connected: it is given up", LONGEST_WAIT, peer.rank)
        self._end(peer)

    def _look_again(self) -> None:
        # Touching a socket may have taken its signal; what arrived is delivered later, never inside a call of the owner.
        if self._loop is None or self._scheduled or self._closed:
            return
        if int(self._router.get(_EVENTS)) & _POLLIN:
            self._scheduled = True
            self._loop.call_soon(self._read_later)

    def _read_later(self) -> None:
        self._scheduled = False
        self._read()

    # -- in

    def _read(self) -> None:
        for _ in range(_BURST):
            if not self._read_one():
                return
        self._look_again()

    def _read_what_waits(self) -> None:
        # Peers have turns, so this many reads reach the end of what any of them had sent; more may go on arriving.
        for _ in range(2 * _UNREAD_MESSAGES * len(self._peers)):
            if not self._read_one():
                return

    def _read_one(self) -> bool:
        if self._closed:
            return False
        receive = self._router.recv
        try:
            identity = receive(_NOW, copy=False)
        except zmq.Again:
            return False
        frame = receive(_NOW, copy=False)  # the rest of a message is there when its beginning is
        body = [frame]
        while frame.more:
            frame = receive(_NOW, copy=False)
            body.append(frame)
        peer = self._by_identity.get(identity.bytes)
        if peer is None or identity.get("User-Id") != peer.name:
            self._warn("dropped a message of rank %s that named another rank as its sender", identity.get("User-Id"))
        elif not peer.connected:
            self._greet(peer, body)
        elif not peer.closed:
            self._deliver(peer, body)
        return True

    def _deliver(self, peer: _Peer, body: list[zmq.Frame]) -> None:
        if len(body) == 1:
            self._on_message(peer.rank, body[0].bytes, [])
            return
        try:
            message, buffers = multipart.join([frame.buffer for frame in body])
        except ValueError as error:
            log.error("rank %d: %s", peer.rank, error)
            self._end(peer)
            return
        self._on_message(peer.rank, message, buffers)

    def _greet(self, peer: _Peer, body: list[zmq.Frame]) -> None:
        """Take a rank's first message, an empty one: from here on its connection is known."""
        peer.connected = True
        waiting, peer.waiting = peer.waiting, []
        # Older connections that had the same descriptor are over before this one counts.
        self._note_connections()
        peer.descriptor = body[0].get(zmq.SRCFD)
        if peer.descriptor not in self._descriptors or len(body) != 1 or len(body[0]):
            self._ending.append(peer)
            assert self._loop is not None
            self._loop.call_soon(self._follow_connections)
            return
        self._by_descriptor[peer.descriptor] = peer
        for frames in waiting:
            self._transmit(peer, frames)

    # -- who may connect, and who is gone

    def _admit(self) -> None:
        """Answer ZeroMQ's questions (RFC 27) whether a client with this key may connect."""
        while not self._closed:
            try:
                version, request_id, _, address, _, mechanism, *credentials = self._zap.recv_multipart(_NOW)
            except zmq.Again:
                return
            key = credentials[0] if mechanism == b"CURVE" and credentials else b""
            peer = self._admissible.pop(key, None)
            if peer is None:
                self._warn(
                    "refused a connection from %s: its key is not that of a rank", address.decode("ascii", "replace")
                )
                verdict = [b"400", b"unknown key", b"", b""]
            else:
                verdict = [b"200", b"OK", peer.name.encode(), b""]
            self._zap.send_multipart([version, request_id, *verdict])

    def _note_connections(self) -> None:
        while not self._closed:
            try:
                event, descriptor = _EVENT.unpack(self._monitor.recv_multipart(_NOW)[0])
            except zmq.Again:
                return
            if event == zmq.EVENT_ACCEPTED:
                self._descriptors.add(descriptor)
                continue
            self._descriptors.discard(descriptor)
            peer = self._by_descriptor.pop(descriptor, None)
            if peer is not None:
                self._ending.append(peer)

    def _follow_connections(self) -> None:
        self._note_connections()
        while self._ending:
            # A connection's end is told after its last message was handed over: read first, then tell.
            self._read_what_waits()
            ending, self._ending = self._ending, []
            for peer in ending:
                self._end(peer)

    def _end(self, peer: _Peer) -> None:
        if peer.closed or self._closed:
            return
        peer.closed = True
        peer.waiting.clear()
        self._on_closed(peer.rank)

    def _warn(self, text: str, *args: object) -> None:
        # Once, or somebody outside could fill the log.
        log.log(logging.DEBUG if self._warned else logging.WARNING, text, *args)
        self._warned = True


def _resolve(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError:
        raise ConfigurationError(
            f"worker_addr: {address!r} is no IP address and no host name that is known here; use e.g. 127.0.0.1"
        ) from None
    return ipaddress.ip_address(found[0][4][0])


def _in_endpoint(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{host}]" if host.version == 6 else str(host)


def _unusable(address: str, port: int | None, error: zmq.ZMQError) -> ConfigurationError:
    if error.errno == errno.EADDRINUSE:
        cure = "choose another, or leave it out to have a free one picked"
        return ConfigurationError(f"worker_port: {port} is in use on {address}; {cure}")
    if error.errno == errno.EACCES:
        return ConfigurationError(f"worker_port: this user may not listen on {port}; use one above 1023")
    cure = "use one of its addresses, or 127.0.0.1"
    return ConfigurationError(f"worker_addr: {address} is not an address of this machine ({error.strerror}); {cure}")

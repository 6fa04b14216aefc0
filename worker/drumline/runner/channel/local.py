"""Local channel: one inherited socket pair per rank; no name, no address, nobody else can connect.

EOF arrives after the rank's last message, so death and data are ordered (docs/adr/0003).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

from drumline import descriptors, framing
from drumline.runner.channel.port import OnClosed, OnMessage, RankEnd
from drumline.segments import PayloadPool, SegmentReader

log = logging.getLogger("drumline.runner.channel")

_CHUNK = 256 << 10
#: So many messages of one rank are read before others, and clients, have their turn.
_MOST_READS = 32
#: A blocked reader of a stream socket is also woken when its peer reads; of a packet socket, only by a message. macOS has
#: none. The frames are the same over both, so nothing else knows the difference.
_KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM


#: Descriptors that wait for their frame. One frame brings one, as a rule.
_MOST_DESCRIPTORS = 64


class _Peer:
    """The runner's end for one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.socket, self.theirs = socket.socketpair(socket.AF_UNIX, _KIND)
        self.socket.setblocking(False)
        self.reader = framing.FrameReader()
        self.segments = SegmentReader()
        self.descriptors: list[int] = []
        self.outgoing: deque[tuple[bytes, list[int]]] = deque()
        self.closed = False
        self.talks = False  # it has sent something since it was last sent anything: more may follow


def _nobody(*_: object) -> None:
    pass


class LocalChannel:
    """Socket pairs for ``world_size`` ranks of one incarnation."""

    def __init__(self, world_size: int) -> None:
        self._peers = [_Peer(rank) for rank in range(world_size)]
        self._chunk = bytearray(_CHUNK)
        self._payloads = PayloadPool()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: OnMessage
        self._on_closed: OnClosed

    def open(self, on_message: OnMessage, on_closed: OnClosed) -> None:
        """See the port."""
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_closed = on_message, on_closed
        for peer in self._peers:
            self._loop.add_reader(peer.socket.fileno(), self._readable, peer)

    def rank_end(self, rank: int) -> RankEnd:
        """See the port."""
        return RankEnd(descriptor=self._peers[rank].theirs.fileno())

    def release_rank_end(self, rank: int) -> None:
        """See the port."""
        self._peers[rank].theirs.close()

    def _readable(self, peer: _Peer) -> None:
        # A call has one answer, after which a look for more would be in vain; updates come in numbers.
        most = _MOST_READS if peer.talks else 1
        peer.talks = True
        while most and self._read(peer):
            most -= 1

    def _read(self, peer: _Peer) -> bool:
        """Read and deliver what came with one system call; False when there was nothing, or nothing more can come."""
        if peer.closed:
            return False
        try:
            size, ancillary, _, _ = peer.socket.recvmsg_into([self._chunk], descriptors.ANCILLARY)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            size, ancillary = 0, []
        if ancillary:
            peer.descriptors += descriptors.received(ancillary)
            if len(peer.descriptors) > _MOST_DESCRIPTORS:
                self._give_up(peer, ValueError("it sends descriptors that belong to no frame"))
                return False
        if not size:
            self._lose(peer)
            return False
        try:
            # Frames are cut before the first is delivered: delivering may read this socket again (drain).
            frames = list(peer.reader.feed(memoryview(self._chunk)[:size]))
        except ValueError as error:
            self._give_up(peer, error)
            return False
        for header, message in frames:
            self._deliver(peer, header, message)
        return True

    def _deliver(self, peer: _Peer, header: bytes, message: bytes) -> None:
        if peer.closed:
            return  # since the frame before was delivered
        buffers: list[Any] = []
        if header:
            try:
                placement = framing.decode_placement(header)
                buffers = peer.segments.read(placement, peer.descriptors)
                message = framing.whole(placement, message, buffers)
            except (ValueError, OSError, RecursionError) as error:
                self._give_up(peer, error)
                return
        self._on_message(peer.rank, message, buffers)

    def _give_up(self, peer: _Peer, error: Exception) -> None:
        log.error("rank %d: %s", peer.rank, error)
        self._lose(peer)

    def drain(self, rank: int) -> None:
        """See the port."""
        peer = self._peers[rank]
        while not peer.closed:
            try:
                if not peer.socket.recv(1, socket.MSG_PEEK):
                    return
            except OSError:
                return
            self._read(peer)

    def _lose(self, peer: _Peer) -> None:
        if peer.closed:
            return
        self._close_peer(peer)
        self._on_closed(peer.rank)

    def send(self, ranks: Sequence[int], message: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """See the port."""
        if not buffers and len(message) <= framing.INLINE_MESSAGE:
            frame = framing.PREFIX.pack(len(message), 0) + message
            for rank in ranks:
                self._send(self._peers[rank], frame, None)
            return
        inline = len(message) <= framing.INLINE_MESSAGE
        placements, descriptor = self._payloads.place(buffers if inline else [message, *buffers], len(ranks))
        body = message if inline else b""
        for rank, placement in zip(ranks, placements, strict=True):
            header = framing.encode_placement(framing.Placement(placement.places, placement.new, [], not inline))
            frame = framing.PREFIX.pack(len(header) + len(body), len(header)) + header + body
            self._send(self._peers[rank], frame, descriptor)

    def _send(self, peer: _Peer, frame: bytes, descriptor: int | None) -> None:
        if peer.closed:
            return
        peer.talks = False
        if not peer.outgoing:
            try:
                piece = frame[: framing.PIECE]
                sent = (
                    peer.socket.send(piece)
                    if descriptor is None
                    else socket.send_fds(peer.socket, [piece], [descriptor])
                )
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                return  # its EOF is on the way and tells the story
            if sent == len(frame):
                return
            if sent:
                frame, descriptor = frame[sent:], None
            assert self._loop is not None
            self._loop.add_writer(peer.socket.fileno(), self._writable, peer)
        peer.outgoing.append((frame, [os.dup(descriptor)] if descriptor is not None else []))

    def _writable(self, peer: _Peer) -> None:
        while peer.outgoing and not peer.closed:
            frame, fds = peer.outgoing[0]
            try:
                piece = frame[: framing.PIECE]
                sent = socket.send_fds(peer.socket, [piece], fds) if fds else peer.socket.send(piece)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                sent = len(frame)
            if sent:
                for descriptor in fds:
                    os.close(descriptor)
                fds = []
            peer.outgoing[0] = (frame[sent:], fds)
            if not peer.outgoing[0][0]:
                peer.outgoing.popleft()
        if self._loop is not None and not peer.closed:
            self._loop.remove_writer(peer.socket.fileno())

    def _close_peer(self, peer: _Peer) -> None:
        if peer.closed:
            return
        peer.closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(peer.socket.fileno())
            self._loop.remove_writer(peer.socket.fileno())
        for _, fds in peer.outgoing:
            for descriptor in fds:
                os.close(descriptor)
        peer.outgoing.clear()
        for descriptor in peer.descriptors:
            os.close(descriptor)
        peer.descriptors.clear()
        peer.socket.close()
        peer.theirs.close()
        peer.segments.close()

    def close(self) -> None:
        """See the port."""
        for peer in self._peers:
            self._close_peer(peer)
        self._payloads.close()
        # Whoever listened holds this channel, too: the two would wait for the garbage collector, with this buffer.
        self._chunk = bytearray()
        self._on_message = self._on_closed = _nobody

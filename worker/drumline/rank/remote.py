"""The rank's end of a remote channel: a ZeroMQ DEALER with CURVE that connects once and never again.

A lost connection is the rank's end, as with an inherited socket: messages would be missing.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Sequence
from typing import Any

import zmq
from typing_extensions import Buffer
from zmq.utils import z85

from drumline import multipart
from drumline.nursery_protocol import RankConfig

#: Unsent messages before ``send`` blocks.
_UNSENT_MESSAGES = 32
#: Time for the last messages to leave at :meth:`RemoteLink.close`.
_GOODBYE_SECONDS = 5.0
_EVENT = struct.Struct("=HI")
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class _Waiter:
    """A thread's place to wait until the socket, its monitor or another thread has news for it."""

    def __init__(self, *descriptors: int) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._poll = select.poll()
        for descriptor in (*descriptors, self._reader):
            self._poll.register(descriptor, select.POLLIN)
        #: True while a thread waits here, or is about to. Guarded by the link's access lock.
        self.waiting = False

    def wait(self) -> None:
        """Block until there may be news."""
        for descriptor, _ in self._poll.poll():
            if descriptor == self._reader:
                os.read(self._reader, 64)

    def wake(self) -> None:
        """End the other thread's :meth:`wait`."""
        if self.waiting:
            try:
                os.write(self._writer, b"!")
            except BlockingIOError:
                return  # woken many times already

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


class RemoteLink:
    """A connection to the runner at ``config.address`` with the keys in ``config``; see :class:`drumline.rank.link.Link`.

    A ZeroMQ socket belongs to one thread at a time: ``_access`` guards every touch, and nobody blocks inside. A touch may
    take the socket's signal away from another thread that waits for it, and then has to wake that thread.
    """

    def __init__(self, config: RankConfig) -> None:
        self._context = zmq.Context(1)
        sock = self._socket = self._context.socket(zmq.DEALER)
        sock.setsockopt(zmq.CURVE_SERVERKEY, config.server_key.encode())
        sock.setsockopt(zmq.CURVE_PUBLICKEY, config.public_key.encode())
        sock.setsockopt(zmq.CURVE_SECRETKEY, config.secret_key.encode())
        sock.setsockopt(zmq.ROUTING_ID, z85.decode(config.public_key))
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.setsockopt(zmq.SNDHWM, _UNSENT_MESSAGES)
        sock.setsockopt(zmq.RCVHWM, 0)
        sock.setsockopt(zmq.MAXMSGSIZE, multipart.LARGEST_FRAME)
        sock.setsockopt(zmq.IPV6, int("[" in config.address))
        sock.monitor("inproc://connection", zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _REFUSED)
        self._monitor = self._context.socket(zmq.PAIR)
        self._monitor.connect("inproc://connection")
        descriptors = sock.fileno(), self._monitor.fileno()
        self._receiver, self._sender = _Waiter(*descriptors), _Waiter(*descriptors)
        self._access = threading.Lock()
        self._order = threading.Lock()
        self._over = ""
        self._closed = False
        sock.connect(config.address)
        sock.send(b"")  # the greeting: it tells the runner which connection is this rank's

    def receive(self) -> tuple[bytes, list[Any]]:
        """See :class:`drumline.rank.link.Link`."""
        while True:
            with self._access:
                frames = self._receive_now()
            if frames is not None:
                return multipart.join([frame.buffer for frame in frames])
            self._receiver.wait()

    def _receive_now(self) -> list[zmq.Frame] | None:
        self._receiver.waiting = False
        frames = self._take()
        # The connection's end is told after its last message was handed over: look for one more.
        if frames is None and self._is_over():
            frames = self._take()
            if frames is None:
                raise EOFError(self._over)
        if self._sender.waiting and (self._over or int(self._socket.EVENTS) & zmq.POLLOUT):
            self._sender.wake()
        self._receiver.waiting = frames is None
        return frames

    def _take(self) -> list[zmq.Frame] | None:
        if self._closed:
            return None
        try:
            return self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None

    def send(self, message: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """See :class:`drumline.rank.link.Link`; raises BrokenPipeError when the connection is lost."""
        frames = multipart.cut(message, buffers)
        with self._order:
            while True:
                with self._access:
                    sent = self._send_now(frames)
                if sent:
                    return
                self._sender.wait()

    def _send_now(self, frames: list[bytes | memoryview]) -> bool:
        self._sender.waiting = False
        if self._closed:
            raise BrokenPipeError("the channel is closed")
        try:
            # Copied: the worker may go on to write to its tensors.
            for frame in frames[:-1]:
                self._socket.send(frame, zmq.SNDMORE | zmq.DONTWAIT, copy=True)
            self._socket.send(frames[-1], zmq.DONTWAIT, copy=True)
            sent = True
        except zmq.Again:  # only before the first frame: a message is taken whole or not at all
            if self._is_over():
                raise BrokenPipeError(self._over) from None
            sent = False
        if self._receiver.waiting and (self._over or int(self._socket.EVENTS) & zmq.POLLIN):
            self._receiver.wake()
        self._sender.waiting = not sent
        return sent

    def _is_over(self) -> bool:
        while not self._closed:
            try:
                event, _ = _EVENT.unpack(self._monitor.recv_multipart(zmq.DONTWAIT)[0])
            except zmq.Again:
                break
            refused = event & _REFUSED
            self._over = self._over or ("the runner refused the connection" if refused else "the connection is lost")
        if self._closed:
            self._over = self._over or "the channel is closed"
        return bool(self._over)

    def close(self) -> None:
        """Let the last messages leave, for a few seconds at most, then close."""
        with self._access:
            if self._closed:
                return
            self._closed = True
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=int(_GOODBYE_SECONDS * 1000))
            self._receiver.wake()
            self._sender.wake()
        self._context.term()
        for waiter in (self._receiver, self._sender):
            if not waiter.waiting:
                waiter.close()

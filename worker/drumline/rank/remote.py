"""The rank's end of a remote channel: ZeroMQ with CURVE, connected once and never again.

A lost connection is the rank's end, as with an inherited socket: messages would be missing. Unlike there, ``send`` only
hands a message to a thread of ZeroMQ's, so that what a rank sent in the last moment before it was killed may be lost.
"""

from __future__ import annotations

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
_RUNNER = b"runner"
_EVENT = struct.Struct("=HI")
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_OVER = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _REFUSED
# Plain numbers are much cheaper to pass than enum members.
_MORE = int(zmq.SNDMORE)
_NOW = int(zmq.DONTWAIT)


class RemoteLink:
    """A connection to the runner at ``config.address`` with the keys in ``config``; see :class:`drumline.rank.link.Link`.

    A ZeroMQ socket belongs to one thread at a time. While the receiver blocks in it, another thread that wants to send
    leaves its message in ``_left`` and wakes the receiver, through the socket's second peer, to send it. (Waiting for the
    socket's descriptor instead, outside the socket, makes a round trip a third slower.)
    """

    def __init__(self, config: RankConfig) -> None:
        self._context = zmq.Context(1)
        # A ROUTER, because it sends to the peer that is named and says when that peer is gone.
        sock = self._socket = self._context.socket(zmq.ROUTER)
        sock.setsockopt(zmq.CURVE_SERVERKEY, config.server_key.encode())
        sock.setsockopt(zmq.CURVE_PUBLICKEY, config.public_key.encode())
        sock.setsockopt(zmq.CURVE_SECRETKEY, config.secret_key.encode())
        sock.setsockopt(zmq.ROUTING_ID, z85.decode(config.public_key))
        sock.setsockopt(zmq.CONNECT_ROUTING_ID, _RUNNER)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.setsockopt(zmq.SNDHWM, _UNSENT_MESSAGES)
        sock.setsockopt(zmq.RCVHWM, 0)
        sock.setsockopt(zmq.MAXMSGSIZE, multipart.LARGEST_FRAME)
        sock.setsockopt(zmq.IPV6, int("[" in config.address))
        sock.monitor("inproc://connection", _OVER | zmq.EVENT_MONITOR_STOPPED)
        self._monitor = self._context.socket(zmq.PAIR)
        self._monitor.connect("inproc://connection")
        sock.connect(config.address)
        sock.bind("inproc://wake")
        self._waker = self._context.socket(zmq.DEALER)
        self._waker.setsockopt(zmq.ROUTING_ID, b"wake")
        self._waker.connect("inproc://wake")
        self._access = threading.Lock()
        #: Guarded by ``_access``, like every touch of the socket but the receiver's, which it announces here.
        self._receiving = False
        self._left: list[list[bytes | memoryview]] = []
        self._taken = threading.Condition(self._access)
        self._over = ""
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="drumline-connection")
        self._watcher.start()
        self._transmit([b""])  # the greeting: it tells the runner which connection is this rank's

    def receive(self) -> tuple[bytes, list[Any]]:
        """See :class:`drumline.rank.link.Link`; only one thread at a time may receive."""
        while True:
            with self._access:
                # What came before the end of the connection is still there to be read.
                how = _NOW if self._over else 0
                self._receiving = True
            try:
                sender = self._socket.recv(how, copy=False)
                frame = self._socket.recv(copy=False)
                frames = [frame]
                while frame.more:
                    frame = self._socket.recv(copy=False)
                    frames.append(frame)
            except zmq.Again:
                raise EOFError(self._over) from None
            finally:
                with self._access:
                    self._receiving = False
                    if self._left:
                        self._send_left()
            if sender.bytes == _RUNNER:
                return (frame.bytes, []) if len(frames) == 1 else multipart.join([f.buffer for f in frames])

    def _send_left(self) -> None:
        for frames in self._left:
            if not self._over:
                self._transmit(frames)
        self._left.clear()
        self._taken.notify_all()

    def send(self, message: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """See :class:`drumline.rank.link.Link`; raises BrokenPipeError when the connection is lost."""
        frames = multipart.cut(message, buffers)
        with self._access:
            if self._receiving:
                self._leave(frames)
            elif not self._over:
                self._transmit(frames)
            if self._over:
                raise BrokenPipeError(self._over)

    def _leave(self, frames: list[bytes | memoryview]) -> None:
        self._left.append(frames)
        self._waker.send(b"")
        # By identity: equal messages of two threads are two messages.
        while any(left is frames for left in self._left):
            self._taken.wait()

    def _transmit(self, frames: list[bytes | memoryview]) -> None:
        try:
            # Copied: the worker may go on to write to its tensors.
            self._socket.send(_RUNNER, _MORE)
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE, copy=True)
            self._socket.send(frames[-1], copy=True)
        except zmq.ZMQError:
            self._over = self._over or "the connection is lost"

    def _watch(self) -> None:
        event, _ = _EVENT.unpack(self._monitor.recv_multipart()[0])
        with self._access:
            if event == zmq.EVENT_MONITOR_STOPPED:
                return
            self._over = self._over or (
                "the runner refused the connection" if event & _REFUSED else "the connection is lost"
            )
            self._waker.send(b"")

    def close(self) -> None:
        """Let the last messages leave, for a few seconds at most, then close."""
        with self._access:
            if self._closed:
                return
            self._closed = True
            self._over = self._over or "the channel is closed"
            self._socket.disable_monitor()
        self._watcher.join()
        self._monitor.close(linger=0)
        self._waker.close(linger=0)
        self._socket.close(linger=int(_GOODBYE_SECONDS * 1000))
        self._context.term()

"""The process at the rank's end in tests of a channel: it does with its link what each message tells it.

A message is msgpack of ``{"do": name, ...}``; a message that comes back is msgpack, too. Run it with one argument, the
``RankEnd`` as JSON: ``python -m drumline.testing.rank_end END``.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import zlib
from typing import Any

import msgspec

from drumline.nursery_protocol import RankConfig
from drumline.rank.link import Link, LocalLink
from drumline.runner.channel.port import RankEnd

encode = msgspec.msgpack.encode


def connect(end: RankEnd) -> Link:
    """Return the rank's link."""
    if end.descriptor is not None:
        return LocalLink(socket.socket(fileno=end.descriptor))
    from drumline.rank.remote import RemoteLink

    keys = (end.address, end.server_key, end.public_key, end.secret_key)
    return RemoteLink(RankConfig("", 0, 1, "cpu", "gloo", "", 1.0, {}, *keys))


def say(text: str) -> None:
    """Tell the test something beside the channel."""
    print(text, flush=True)  # noqa: T201


def serve(link: Link) -> None:
    """Obey until the runner is gone."""
    kept: list[Any] = []
    while True:
        try:
            message, buffers = link.receive()
        except EOFError:
            say("end")
            return
        command = msgspec.msgpack.decode(message)
        match command["do"]:
            case "echo":
                link.send(message, buffers)
            case "change":
                for buffer in buffers:
                    memoryview(buffer).cast("B")[:1] = b"!"
                link.send(encode({}), buffers)
            case "check":
                link.send(encode([zlib.crc32(buffer) for buffer in buffers]))
            case "make":  # `count` messages; `size` bytes each, in the message or as a buffer
                make(link, command["count"], command["size"], buffer=command["buffer"], report=command.get("report", 0))
            case "keep":
                kept += buffers
            case "check kept":
                link.send(encode([zlib.crc32(buffer) for buffer in kept]))
            case "drop":
                kept.clear()
            case "pause":
                say("paused")
                sys.stdin.buffer.read(1)
            case "threads":
                for number in range(command["threads"]):
                    threading.Thread(target=send_many, args=(link, number, command["count"])).start()
            case "descriptors":
                link.send(encode(len(os.listdir("/dev/fd"))))
            case "close":
                link.close()
                say("closed")
                sys.stdin.buffer.read(1)
                return
            case "leave":  # like a rank: what was sent leaves, then the process ends
                make(link, command["count"], command["size"], buffer=False)
                link.close()
                os._exit(3)
        del message, buffers, command


def make(link: Link, count: int, size: int, *, buffer: bool, report: int = 0) -> None:
    """Send ``count`` messages with ``size`` bytes each, and say every ``report``-th number."""
    for number in range(count):
        body = bytes([number % 251]) * size
        link.send(encode({"number": number, "body": b"" if buffer else body}), [body] if buffer else [])
        if report and number % report == 0:
            say(str(number))
    if report:
        say("done")


def send_many(link: Link, thread: int, count: int) -> None:
    """Send ``count`` messages from this thread."""
    for number in range(count):
        # Now and then one with a buffer: its frames must stay together.
        link.send(encode({"thread": thread, "number": number}), [b"x" * 100_000] if number % 10 == 0 else [])


if __name__ == "__main__":
    own = connect(msgspec.json.decode(sys.argv[1], type=RankEnd))
    try:
        serve(own)
    except BrokenPipeError:
        say("end")
    own.close()

"""What every incarnation of a group is started with."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from drumline import codec, targets
from drumline import nursery_protocol as wire
from drumline.codec import Packed
from drumline.errors import EncodingError, InvalidPayload
from drumline.runner.channel.local import LocalChannel
from drumline.runner.channel.port import Channel

#: Larger than any message: the value travels inside it, whole.
_ALL_INLINE = 1 << 62


@dataclass
class Plan:
    """What every incarnation is started with."""

    reference: str
    template: wire.RankConfig
    cwd: str | None
    method: str
    make_channel: Callable[[int], Channel]
    setup: tuple[bytes, list[Any]]
    warmup: bytes
    startup_timeout: float
    hang_timeout: float


def reference_of(worker: type | str) -> str:
    """Return what the nursery imports for ``worker``."""
    return worker if isinstance(worker, str) else targets.class_reference(worker)


def environment(world_size: int, master_addr: str, master_port: int | None) -> dict[str, str]:
    """Return torchrun's variables that all ranks share; None picks a free port."""
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port or _free_port()),
    }


def channel_maker(world_size: int, address: str | None, port: int | None) -> Callable[[int], Channel]:
    """Return what makes the channel of an incarnation: socket pairs, or ZeroMQ when an address or port is given."""

    def make(incarnation: int) -> Channel:
        del incarnation
        if address is None and port is None:
            return LocalChannel(world_size)
        from drumline.runner.channel.remote import RemoteChannel

        return RemoteChannel(world_size, address or "127.0.0.1", port)

    return make


def packed(value: Mapping[str, Any], path: str, *, inline: bool = False) -> Packed:
    """Return ``value`` as it travels.

    Raises:
        InvalidPayload: it cannot; the message names the place.
    """
    try:
        plain = value if type(value) is dict else dict(value)
        return codec.pack(plain, path=path, inline_limit=_ALL_INLINE if inline else codec.INLINE_LIMIT)
    except (EncodingError, TypeError, ValueError) as error:
        raise InvalidPayload(str(error)) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

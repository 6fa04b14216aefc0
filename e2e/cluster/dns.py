"""One question to a DNS server, without the machine's resolver."""

from __future__ import annotations

import random
import socket
import struct
import sys


def query(name: str, number: int) -> bytes:
    """The packet that asks for the IPv4 address of `name`.

    Args:
        name: Labels separated by dots.
        number: 16 bits that the answer repeats.
    """
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split("."))
    return struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)


def address(answer: bytes, number: int) -> str | None:
    """The address in an answer, or None where it is an error, has none, or answers something else."""
    if len(answer) < 16 or struct.unpack(">H", answer[:2])[0] != number:
        return None
    if answer[3] & 0xF or struct.unpack(">H", answer[6:8])[0] == 0:
        return None
    return socket.inet_ntoa(answer[-4:])


def resolve(name: str, server: str, limit: float = 0.25) -> str | None:
    """Ask `server` for the IPv4 address of `name`; None without a good answer within `limit` seconds."""
    number = random.randrange(1 << 16)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.settimeout(limit)
        try:
            connection.sendto(query(name, number), (server, 53))
            return address(connection.recv(512), number)
        except OSError:
            return None


if __name__ == "__main__":  # asked so where the machine itself does not get to, in a node's network
    print(resolve(sys.argv[1], sys.argv[2], limit=1.0) or "")

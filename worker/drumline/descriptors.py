"""File descriptors that travel over a Unix socket (``SCM_RIGHTS``)."""

from __future__ import annotations

import array
import os
import socket

#: Room for the descriptors of one read.
ANCILLARY = socket.CMSG_SPACE(32 * array.array("i").itemsize)


def received(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors in ``recvmsg``'s ancillary data, not inheritable."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    for descriptor in found:
        os.set_inheritable(descriptor, False)
    return list(found)

"""How many bytes of request bodies the server holds at a time, of all requests together."""

from __future__ import annotations

from typing import Final, Protocol

from drumline import problems

#: Bodies up to this size are always taken: many calls are small, and must come through whatever large ones do.
SMALL_BYTES = 64 << 10
#: Bodies of the largest size that fit whatever was set, so that one does not keep out all others.
_LARGEST: Final = 4


class Holder(Protocol):
    """A request, as far as its body is concerned."""

    body_bytes: int
    """How many bytes are counted for it now."""


class BodyBudget:
    """Counts what large bodies take, from their first bytes until their request is answered.

    One body is bounded by ``max_body_bytes``; without a bound on all of them, as many as may wait in the queue and as many
    as connections can bring would each be held in full, and the container would be killed for its memory.

    Args:
        most: bytes of all together.
        largest: bytes of one; ``most`` is never less than four of these.
    """

    def __init__(self, most: int, largest: int) -> None:
        self._most = max(most, _LARGEST * largest)
        self.held = 0

    def hold(self, holder: Holder, size: int) -> None:
        """The body of ``holder`` has now ``size`` bytes.

        Raises:
            ProblemError: 503, all bodies together are too large; what was counted for it stays so until :meth:`release`.
        """
        if size <= SMALL_BYTES:
            return
        more = size - holder.body_bytes
        if self.held + more > self._most:
            text = f"Request bodies of {self.held} bytes are held, and all may have {self._most}. Try again shortly."
            raise problems.ProblemError(problems.make("too-many-bytes", text))
        self.held += more
        holder.body_bytes = size

    def release(self, holder: Holder) -> None:
        """``holder`` is answered."""
        self.held -= holder.body_bytes
        holder.body_bytes = 0

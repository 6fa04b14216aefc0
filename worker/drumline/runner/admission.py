"""A bounded queue that is fair between callers: first come, first served within one, turn by turn between several. PURE."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class FairQueue:
    """Waiting request numbers.

    A caller that has many requests waiting delays another caller by at most one request per turn.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: OrderedDict[str, OrderedDict[int, None]] = OrderedDict()
        self._callers: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._callers)

    def __contains__(self, number: int) -> bool:
        return number in self._callers

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._callers))

    @property
    def full(self) -> bool:
        """True when no further request may wait."""
        return len(self._callers) >= self.limit

    def put(self, number: int, caller: str) -> None:
        """Append request ``number`` of ``caller``. The limit is the caller's business (see :attr:`full`)."""
        self._callers[number] = caller
        self._waiting.setdefault(caller, OrderedDict())[number] = None

    def take(self) -> int | None:
        """Remove and return the next request, or None."""
        if not self._waiting:
            return None
        caller, numbers = next(iter(self._waiting.items()))
        number, _ = numbers.popitem(last=False)
        if numbers:
            self._waiting.move_to_end(caller)
        else:
            del self._waiting[caller]
        del self._callers[number]
        return number

    def remove(self, number: int) -> bool:
        """Forget request ``number``; False when it does not wait."""
        caller = self._callers.pop(number, None)
        if caller is None:
            return False
        numbers = self._waiting[caller]
        del numbers[number]
        if not numbers:
            del self._waiting[caller]
        return True

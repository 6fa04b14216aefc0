"""The fair queue: in order for one caller, turn by turn between several, nothing lost, nothing twice."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from drumline.runner.admission import FairQueue

callers = st.sampled_from("abcd")


class Queue(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(8)
        self.waiting: dict[str, list[int]] = defaultdict(list)
        self.number = 0
        #: For each waiting caller: turns that others had since it last had one (or came).
        self.passed: dict[str, Counter[str]] = {}

    @rule(caller=callers)
    def put(self, caller: str) -> None:
        if self.queue.full:
            return
        self.number += 1
        self.queue.put(self.number, caller)
        if not self.waiting[caller]:
            self.passed[caller] = Counter()
        self.waiting[caller].append(self.number)

    @rule()
    def take(self) -> None:
        number = self.queue.take()
        if number is None:
            assert not any(self.waiting.values())
            return
        (caller,) = [name for name, numbers in self.waiting.items() if number in numbers]
        assert self.waiting[caller][0] == number, "first come, first served"
        self.waiting[caller].remove(number)
        self.passed[caller] = Counter()
        for other, numbers in self.waiting.items():
            if numbers and other != caller:
                self.passed[other][caller] += 1
                assert self.passed[other][caller] <= 1, "nobody has two turns while somebody else waits"

    @rule(caller=callers, last=st.booleans())
    def remove(self, caller: str, last: bool) -> None:
        numbers = self.waiting[caller]
        if numbers:
            number = numbers.pop(-1 if last else 0)
            assert self.queue.remove(number)
            assert not self.queue.remove(number)

    @invariant()
    def nothing_lost(self) -> None:
        expected = {number for numbers in self.waiting.values() for number in numbers}
        assert set(self.queue) == expected
        assert len(self.queue) == len(expected)
        assert self.queue.full == (len(expected) >= 8)
        assert all(number in self.queue for number in expected)
        assert self.number + 1 not in self.queue


TestQueue = Queue.TestCase

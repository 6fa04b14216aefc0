"""A worker that returns, raises and does what no worker should; its group must survive all of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from drumline.errors import DrumlineError, InvalidPayload, RequestCancelled
from drumline.worker import DistributedWorker


class Poison(DistributedWorker):
    """Looks up what to do in :data:`RESULTS`, :data:`RAISES` and :data:`DEEDS`."""

    def __call__(self, streaming: bool = False, act: str = "", how: str = "return", rank: int = 0) -> Any:
        """Do ``act`` on ``rank`` (-1: all).

        Args:
            streaming: see the base class.
            act: a key of one of the tables.
            how: ``return`` a result, or send it as an ``update``; ``async``: from a coroutine.
            rank: where.
        """
        self.rank_print(f"to do: {act or 'nothing'}")  # works, whatever an earlier request has done to the output
        if not act or rank not in (self.rank, -1):
            return {"fine": True}
        if how == "async":
            return self._later(act)
        return self._act(act, how)

    async def _later(self, act: str) -> Any:
        await asyncio.sleep(0)
        return self._act(act, "return")

    def _act(self, act: str, how: str) -> Any:
        if act in RESULTS:
            value = RESULTS[act]()
            if how == "update":
                self.add_streaming_result(value)
                return {"fine": True}
            return value
        if act in RAISES:
            raise RAISES[act]()
        DEEDS[act]()
        return {"fine": True}


# -- results


class Image:
    """Not the one of PIL."""

    size = (1, 1)
    mode = "RGB"

    def save(self, *_: Any, **__: Any) -> None:
        """Never called."""
        raise AssertionError("somebody took this for an image")


class Tensor:
    """Not the one of torch."""

    dtype = "float32"
    shape = (1,)

    def cpu(self) -> NoReturn:
        """Never called."""
        raise AssertionError("somebody took this for a tensor")


class _Hostile:
    def __getattr__(self, name: str) -> NoReturn:
        raise SystemExit(f"who asks for {name}?")


class _HostileDict(dict[str, Any]):
    def items(self) -> Any:
        raise SystemExit("no items")

    def __iter__(self) -> Iterator[str]:
        raise KeyboardInterrupt

    def keys(self) -> Any:
        raise SystemExit("no keys")


def _image(mode: str) -> Callable[[], Any]:
    def make() -> Any:
        from PIL import Image as Pillow

        return {"image": Pillow.new(mode, (9, 7))}

    return make


def _cycle() -> Any:
    value: dict[str, Any] = {}
    value["again"] = [value]
    return value


def _deep() -> Any:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return {"deep": value}


def _tensor(how: str) -> Callable[[], Any]:
    def make() -> Any:
        import torch

        if how == "meta":
            return {"tensor": torch.empty(3, device="meta")}
        if how == "sparse":
            return {"tensor": torch.eye(3).to_sparse()}
        if how == "grad":
            return {"tensor": torch.ones(3, requires_grad=True) * 2}
        if how == "nan":
            return {"tensor": torch.full((3,), float("nan"))}
        return {"tensor": torch.ones(200 << 18)}

    return make


RESULTS: dict[str, Callable[[], Any]] = {
    "nan": lambda: {"x": float("nan")},
    "infinity": lambda: {"x": [1.0, float("-inf")]},
    "bytes": lambda: {"x": b"\x00\xff", "y": bytearray(3)},
    "huge int": lambda: {"x": 10**5000},
    "surrogate": lambda: {"x": "\ud800"},
    "none": lambda: None,
    "list": lambda: [1, 2],
    "text": lambda: "text",
    "number": lambda: 7,
    "tuple": lambda: (1, (2,)),
    "set": lambda: {1, 2},
    "odd keys": lambda: {1: "a", None: "b", (1, 2): "c"},
    "int keys": lambda: {1: "a", 2: "b"},
    "complex": lambda: {"x": 1 + 2j},
    "object": lambda: {"x": object()},
    "lambda": lambda: {"x": lambda: None},
    "lock": lambda: {"x": threading.Lock()},
    "generator": lambda: (n for n in range(3)),
    "module": lambda: {"x": sys},
    "class": lambda: {"x": Poison},
    "exception": lambda: {"x": ValueError("as a value")},
    "coroutine in a dict": lambda: {"x": _closed_coroutine()},
    "cycle": _cycle,
    "deep": _deep,
    "hostile object": lambda: {"x": _Hostile()},
    "hostile dict": lambda: _HostileDict(a=1),
    "user's Image": lambda: {"x": Image()},
    "user's Tensor": lambda: {"x": Tensor()},
    "RGBA": _image("RGBA"),
    "LA": _image("LA"),
    "P": _image("P"),
    "CMYK": _image("CMYK"),
    "16 bit": _image("I;16"),
    "32 bit": _image("I"),
    "float image": _image("F"),
    "1 bit": _image("1"),
    "LAB": _image("LAB"),
    "YCbCr": _image("YCbCr"),
    "meta tensor": _tensor("meta"),
    "sparse tensor": _tensor("sparse"),
    "tensor with grad": _tensor("grad"),
    "nan tensor": _tensor("nan"),
    "200 MiB tensor": _tensor("big"),
    "200 MiB bytes": lambda: {"x": bytes(200 << 20)},
    "300 MiB bytes": lambda: {"x": bytes(300 << 20)},
    "many buffers": lambda: {"x": [bytes(70_000) for _ in range(300)]},
}


def _closed_coroutine() -> Any:
    async def nothing() -> None: ...

    coroutine = nothing()
    coroutine.close()  # or Python warns that nobody awaited it
    return coroutine


# -- exceptions


class BrokenStr(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text either")

    __repr__ = __str__


class ViciousStr(Exception):
    """Whoever asks what it is must go."""

    def __str__(self) -> str:
        raise SystemExit(1)


class _Text(str):
    __slots__ = ()

    def encode(self, *_: Any) -> NoReturn:
        raise RuntimeError("no bytes")

    def __getitem__(self, key: Any) -> NoReturn:
        raise RuntimeError("no parts")


class OddStr(Exception):
    """Its text is not quite one."""

    def __str__(self) -> str:
        return _Text("odd")


class Unpicklable(Exception):
    """Cannot be pickled, nor built from its args."""

    def __init__(self, one: Any, *, two: Any) -> None:
        super().__init__("unpicklable")
        self.lock = threading.Lock()
        self.two = two


def _unnamed() -> BaseException:
    unnamed: type[Exception] = type("\ud800\nname", (Exception,), {"__module__": 5})
    return unnamed("unnamed")


def _group(depth: int) -> BaseException:
    error: Exception = ValueError("inside")
    for _ in range(depth):
        error = ExceptionGroup("group", [error])
    return error


def _chain() -> BaseException:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


def _cancelled(step: Any) -> Callable[[], BaseException]:
    return lambda: RequestCancelled("by the worker itself", step=step)


RAISES: dict[str, Callable[[], BaseException]] = {
    "broken str": BrokenStr,
    "vicious str": ViciousStr,
    "odd str": OddStr,
    "unpicklable": lambda: Unpicklable(1, two=lambda: None),
    "unnamed": _unnamed,
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "StopIteration": StopIteration,
    "CancelledError": asyncio.CancelledError,
    "MemoryError": MemoryError,
    "RecursionError": RecursionError,
    "BrokenPipeError": lambda: BrokenPipeError(32, "Broken pipe"),
    "EOFError": EOFError,
    "group": lambda: _group(3),
    "deep group": lambda: _group(10_000),
    "BaseExceptionGroup": lambda: BaseExceptionGroup("base", [KeyboardInterrupt()]),
    "chain": _chain,
    "10 MiB message": lambda: ValueError("x" * (10 << 20)),
    "surrogate message": lambda: ValueError("\ud800"),
    "DrumlineError": lambda: DrumlineError("ours"),
    "InvalidPayload": lambda: InvalidPayload("theirs", detail=[{"loc": [object()], "msg": b"\xff"}]),
    "RequestCancelled": _cancelled(None),
    "odd RequestCancelled": _cancelled("seven"),
    "huge RequestCancelled": _cancelled(1 << 90),
}


# -- deeds


def _fork() -> None:
    child = os.fork()
    if child == 0:
        raise SystemExit(0)  # a child that goes on as if it were the rank
    os.waitpid(child, 0)


def _threads() -> None:
    for _ in range(20):
        threading.Thread(target=threading.Event().wait, daemon=False).start()


def _recurse(depth: int = 0) -> int:
    return _recurse(depth + 1) + 1


def _no_descriptors() -> None:
    """Leave none for result memory; :func:`_descriptors_again` is the cure."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, _LIMITS[1]))
    with contextlib.suppress(OSError):
        while True:
            _TAKEN.append(os.dup(0))


def _descriptors_again() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, _LIMITS)
    while _TAKEN:
        os.close(_TAKEN.pop())


_LIMITS = resource.getrlimit(resource.RLIMIT_NOFILE)
_TAKEN: list[int] = []


class _Stream:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        raise RuntimeError("cannot be flushed")


def _close_stdout() -> None:
    sys.stdout.close()


def _replace_stdout() -> None:
    sys.stdout = _Stream()


DEEDS: dict[str, Callable[[], Any]] = {
    "close stdout": _close_stdout,
    "replace stdout": _replace_stdout,
    "no stdout": lambda: setattr(sys, "stdout", None),
    "close descriptor 1": lambda: os.close(1),
    "10 MiB of lines": lambda: os.write(2, b"x" * 99 + b"\n") and print(("y" * 1023 + "\n") * (10 << 10)),  # noqa: T201
    "10 MiB without a line end": lambda: sys.stderr.write("z" * (10 << 20)),
    "binary output": lambda: os.write(2, bytes(range(256)) * 100),
    "chdir": lambda: os.chdir("/"),
    "threads": _threads,
    "fork": _fork,
    "recursion": _recurse,
    "no descriptors": _no_descriptors,
    "descriptors again": _descriptors_again,
}

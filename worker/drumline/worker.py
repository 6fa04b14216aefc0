"""What users subclass: :class:`DistributedWorker`, one instance in every rank's process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch


class RequestContext(msgspec.Struct, frozen=True):
    """The request that a rank runs.

    Attributes:
        request_id: as in the ``X-Request-Id`` header.
        deadline: UNIX seconds after which nobody waits for the result any more, or None.
        headers: HTTP headers that the server lets through, names in lower case.
        streaming: True when updates reach somebody.
    """

    request_id: str = ""
    deadline: float | None = None
    headers: dict[str, str] = {}
    streaming: bool = False


@dataclass
class Services:
    """What the rank's loop lends to its worker; users never see it."""

    emit: Callable[[Any, str], None]
    emit_error: Callable[[BaseException | str], None]
    beat: Callable[[], None]
    reach: Callable[[], None]


class DistributedWorker:
    """Base class of workers. The same code runs on every rank, like under ``torchrun``.

    Attributes:
        rank: 0 .. world_size - 1. Rank 0's return value is the result.
        world_size: number of ranks.
        device: ``cuda:<local rank>`` on GPUs, ``cpu`` otherwise. Set before ``setup()``; the process's current CUDA
            device is the same one, and ``torch.distributed`` is initialised.
        request: the request in hand (an empty one during ``setup()``).
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device
    request: RequestContext = RequestContext()
    _services: Services | None = None

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    # -- to override. `*args: Any, **kwargs: Any` is what type checkers let any other signature override.

    def setup(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model. Runs once per process, sync or async; ``kwargs`` are the runner's ``start()`` keywords."""

    def __call__(self, *args: Any, **payload: Any) -> Any:
        """Run one request; called on every rank with the same payload, sync or async.

        Args:
            *args: ``streaming`` (name it so): True when the caller reads updates (see :meth:`add_streaming_result`).
            **payload: the request's JSON object. Name parameters and annotate them: they become the request schema.

        Returns:
            On rank 0 the result: JSON-like data that may hold tensors, arrays and PIL images. Other ranks' values are
            dropped.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not define __call__")

    def teardown(self) -> Any:
        """Release what ``setup()`` took. Runs once per process at an orderly end, sync or async."""

    # -- to call

    def add_streaming_result(self, result: Any, image_format: str = "jpeg", as_text_event: bool = True) -> None:
        """Send an update to the caller, in order, at once; without effect when nobody streams.

        Args:
            result: like a result of ``__call__``. It is copied: the caller may go on to change it.
            image_format: how images in it are encoded for HTTP: jpeg, png or webp.
            as_text_event: accepted for fal's sake; the reader decides how updates are framed.

        Raises:
            EncodingError: ``result`` holds something that cannot be carried; the message says where.
        """
        del as_text_event
        self._lent().emit(result, image_format)

    def add_streaming_error(self, error: BaseException | str) -> None:
        """Send ``error`` as an update ``{"error": text}``; the request goes on."""
        self._lent().emit_error(error)

    def progress(self, done: float, total: float | None = None, **metrics: Any) -> None:
        """Report progress: an update ``{"progress": {"done", "total", **metrics}}`` from rank 0, a heartbeat from all."""
        services = self._lent()
        services.beat()
        if self.rank == 0:
            services.emit({"progress": {"done": done, "total": total, **metrics}}, "jpeg")

    def checkpoint(self) -> None:
        """Mark a step boundary. Call it at the same places on every rank, e.g. once per denoising step.

        It is a heartbeat, and it is where a cancelled request ends.

        Raises:
            RequestCancelled: on all ranks at the same step, when the request was cancelled. Let it pass.
        """
        self._lent().reach()

    def rank_print(self, message: object, debug: bool = False) -> None:
        """Print one line; the log shows it with this rank and the request id.

        That an earlier request has closed or replaced ``sys.stdout`` does not fail this one.

        Args:
            message: anything printable.
            debug: show it at log level debug only.
        """
        if debug:
            logging.getLogger("drumline.worker").debug("%s", message)
        else:
            text = f"{message}\n"
            try:
                sys.stdout.write(text)  # the rank's output is the log
                sys.stdout.flush()
            except Exception:
                with contextlib.suppress(OSError):
                    os.write(2, text.encode("utf-8", "backslashreplace"))  # the same pipe

    def _lent(self) -> Services:
        if self._services is None:
            raise RuntimeError(
                f"{type(self).__qualname__} is not running in a rank; start it with DistributedRunner or `drumline run`"
            )
        return self._services

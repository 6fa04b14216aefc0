"""Updates on their way out: snapshots are taken at the call, images are encoded off the compute thread, order is kept."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from typing import Any

from drumline import codec, protocol
from drumline.rank.link import Link

#: Snapshots that may wait for the encoder; then ``add_streaming_result`` blocks, which bounds the memory.
LONGEST_BACKLOG = 32
PREVIEW_QUALITY = 80


class Updates:
    """The update sender of one rank."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._sequence = 0
        self._active = False
        self._pixels = False
        self._backlog: deque[tuple[int, Any, str]] = deque()
        self._busy = False
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def begin(self, sequence: int, *, streaming: bool, pixels: bool) -> None:
        """Start a request. ``pixels``: the reader is in process and gets images as pixels, not encoded."""
        self._sequence, self._active, self._pixels = sequence, streaming, pixels
        self._failure = None

    def emit(self, value: Any, image_format: str) -> None:
        """Send ``value`` as the next update; nothing happens when nobody streams."""
        if not self._active:
            return
        images = "pixels" if self._pixels else image_format
        if (images == "pixels" or not holds_image(value)) and not self._busy and not self._backlog:
            self._send(self._sequence, value, images)
            return
        item = (self._sequence, codec.snapshot(value), images)
        with self._changed:
            while len(self._backlog) >= LONGEST_BACKLOG:
                self._changed.wait()
            self._backlog.append(item)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._encode, daemon=True, name="drumline-updates")
                self._thread.start()

    def emit_error(self, error: BaseException | str) -> None:
        """Send ``error`` as an update ``{"error": text}``."""
        self.emit({"error": str(error)}, "jpeg")

    def _send(self, sequence: int, value: Any, images: str) -> None:
        data, buffers = codec.pack(value, images=images, path="update", quality=PREVIEW_QUALITY)
        self._link.send(protocol.encode(protocol.Update(sequence, data)), buffers)

    def _encode(self) -> None:
        while True:
            with self._changed:
                while not self._backlog:
                    self._changed.wait()
                sequence, value, images = self._backlog.popleft()
                self._busy = True
                self._changed.notify_all()
            try:
                self._send(sequence, value, images)
            except Exception as error:  # end() raises it where the request can fail of it
                self._failure = self._failure or error
            finally:
                value = None
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def end(self) -> None:
        """Finish the request: return when every update has been sent.

        Raises:
            EncodingError: an update could not be carried.
        """
        self._active = False
        if self._thread is None:
            return
        with self._changed:
            while self._backlog or self._busy:
                self._changed.wait()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Finish a request that failed: what was emitted before the failure is still sent."""
        with contextlib.suppress(Exception):
            self.end()


def holds_image(value: Any) -> bool:
    """Whether ``value`` (dicts and lists deep) holds a PIL image."""
    pil = sys.modules.get("PIL.Image")
    if pil is None:
        return False
    stack, seen = [value], 0
    while stack:
        item = stack.pop()
        seen += 1
        if isinstance(item, pil.Image):
            return True
        if seen > 10_000:  # too much to look through; the encoder thread takes anything
            return True
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return False

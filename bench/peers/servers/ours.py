"""Ours: ``drumline run bench/peers/servers/ours.py:Worker -n 2``."""

from __future__ import annotations

from typing import Any

from drumline.distributed import DistributedWorker


class Worker(DistributedWorker):
    """The work on every rank; rank 0's result is the answer."""

    def setup(self) -> None:
        """Make the values."""
        from bench.peers.servers.work import Work

        self.work = Work()

    def __call__(self, streaming: bool = False, **request: Any) -> dict[str, Any]:
        """Answer one request."""
        if streaming:
            for update in self.work.updates(request):
                self.add_streaming_result(update)
            return {"over": True}
        return self.work.value(request)

"""LitServe: FastAPI in front of worker processes. One worker: it has no groups. ``... litserve_server PORT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import litserve

from bench.peers.servers.work import Work


class Invoke(litserve.LitAPI):
    """Answers with JSON."""

    def setup(self, device: str) -> None:
        """Make the values."""
        del device
        self.work = Work()

    def predict(self, x: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        return self.work.answer(x)


class Stream(litserve.LitAPI):
    """Answers with server-sent events."""

    def setup(self, device: str) -> None:
        """Nothing to make."""

    def predict(self, x: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the updates."""
        yield from Work.updates(x)

    def encode_response(self, output: Iterator[dict[str, Any]]) -> Iterator[str]:
        """Frame them."""
        for update in output:
            yield f"data: {json.dumps(update)}\n\n"


if __name__ == "__main__":
    apis = [Invoke(api_path="/"), Stream(api_path="/stream", stream=True)]
    server = litserve.LitServer(apis, accelerator="cpu", fast_queue=True, restart_workers=True)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False, access_log=False
    )

"""mosec: a Rust HTTP front and Python worker processes. One worker: it has no groups. ``... mosec_server --port PORT``."""

from __future__ import annotations

import json
from typing import Any

from mosec import Runtime, Server, SSEWorker, Worker

from bench.peers.servers.work import Work


class Invoke(Worker):
    """Answers with JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        return self.work.answer(data)


class Stream(SSEWorker):
    """Answers with server-sent events."""

    def forward(self, data: dict[str, Any]) -> str:
        """Send the updates."""
        for update in Work.updates(data):
            self.send_stream_event(json.dumps(update))
        return ""


if __name__ == "__main__":
    server = Server()
    server.register_runtime({"/invoke": [Runtime(Invoke, timeout=60)], "/stream": [Runtime(Stream, timeout=60)]})
    server.run()

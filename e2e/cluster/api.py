"""A small client of the API server, for the few calls that bring a cluster up; tests use a real client."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from .errors import ClusterError
from .objects import api_path

FIELD_MANAGER = "drumline-e2e"


class ApiError(ClusterError):
    """The API server answered with an error.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """One connection to an API server, as its administrator; not for several threads at once."""

    def __init__(self, host: str, port: int, pki: Path) -> None:
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._context = context
        self._host, self._port = host, port
        self._connection = self._connect(limit=10.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _connect(self, limit: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._host, self._port, timeout=limit, context=self._context)

    def ready(self) -> bool:
        """Whether all parts of the API server say that they are ready."""
        try:
            self.request("GET", "/readyz")
        except (OSError, http.client.HTTPException, ApiError):
            self._connection.close()
            return False
        return True

    def request(self, method: str, path: str, body: object = None, content_type: str = "application/json") -> bytes:
        """One call.

        Raises:
            ApiError: The answer is an error.
            OSError: There is no answer.
        """
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, {"Content-Type": content_type} if data else {})
        response = self._connection.getresponse()
        content = response.read()
        if response.status >= 300:
            raise ApiError(response.status, f"{method} {path}: {_message(content) or response.reason}")
        return content

    def get(self, path: str) -> dict[str, Any]:
        """An object or a list of them."""
        value: dict[str, Any] = json.loads(self.request("GET", path))
        return value

    def apply(self, item: Mapping[str, Any]) -> None:
        """Create or change an object (server-side apply)."""
        # JSON is YAML, which is the only type that the API server takes for this.
        path = f"{api_path(item)}?fieldManager={FIELD_MANAGER}&force=true"
        self.request("PATCH", path, item, "application/apply-patch+yaml")

    def follow(self, path: str, seconds: int) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """A list and its changes.

        Args:
            path: Of the list.
            seconds: When the watch ends.

        Yields:
            Name and object: first all that are there, then each that changes; None for one that is gone.
        """
        found = self.get(path)
        yield from ((item["metadata"]["name"], item) for item in found["items"])
        connection = self._connect(limit=seconds + 5.0)
        separator = "&" if "?" in path else "?"
        version = found["metadata"]["resourceVersion"]
        try:
            query = f"watch=true&resourceVersion={version}&timeoutSeconds={seconds}"
            connection.request("GET", f"{path}{separator}{query}")
            for line in connection.getresponse():
                event = json.loads(line)
                if event["type"] == "ERROR":  # the version is too old: the caller lists anew
                    return
                item = event["object"]
                yield item["metadata"]["name"], None if event["type"] == "DELETED" else item
        finally:
            connection.close()


def _message(content: bytes) -> str:
    """The words of a Status object."""
    try:
        value = json.loads(content)
    except ValueError:
        return content.decode(errors="replace").strip()
    return str(value.get("message", "")) if isinstance(value, dict) else ""

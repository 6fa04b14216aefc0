"""API keys, and who a caller is (for the fair queue)."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from drumline import problems

#: Answered without a key, for the probes of whatever runs the container.
OPEN_PATHS = frozenset({"/healthz", "/startupz", "/readyz"})
_CHALLENGE = (("www-authenticate", 'Key realm="drumline"'), ("www-authenticate", 'Bearer realm="drumline"'))


class ApiKeys:
    """Checks ``Authorization: Key k``, ``Authorization: Bearer k`` or ``X-API-Key: k`` against a set of keys.

    Args:
        keys: the accepted keys; empty lets everybody in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests are compared, so that not even the length of a key shows in the time.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    def caller(self, headers: Mapping[bytes, bytes], client: str) -> str:
        """Return who calls: ``key-<index>`` with keys on, else the client's address.

        Raises:
            ProblemError: 401, no key or none of ours.
        """
        if not self._keys:
            return client
        offered = _offered(headers)
        if offered is None:
            raise problems.ProblemError(
                problems.make(
                    "unauthorized",
                    "Send a key as 'Authorization: Key <key>', 'Authorization: Bearer <key>' or 'X-API-Key: <key>'.",
                    headers=_CHALLENGE,
                )
            )
        digest = hashlib.sha256(offered).digest()
        found = -1
        # Every key is compared, whether one matched already or not: the time tells nothing about which one it was.
        for index, key in enumerate(self._keys):
            if hmac.compare_digest(key, digest):
                found = index
        if found < 0:
            raise problems.ProblemError(
                problems.make("unauthorized", "This API key is not accepted here.", headers=_CHALLENGE)
            )
        return f"key-{found}"


def _offered(headers: Mapping[bytes, bytes]) -> bytes | None:
    value = headers.get(b"authorization")
    if value is not None:
        scheme, _, key = value.partition(b" ")
        if scheme.lower() in (b"key", b"bearer") and key.strip():
            return key.strip()
    return headers.get(b"x-api-key") or None

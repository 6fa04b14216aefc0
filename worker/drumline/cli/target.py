"""Which app ``invoke`` and ``stream`` mean, and the client for it."""

from __future__ import annotations

import re
from pathlib import Path

from drumline.client import Client
from drumline.errors import ConfigurationError

_APP_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?(/[a-z]([-a-z0-9]*[a-z0-9])?)?")


def client_for(
    target: str, *, api_key: str | None, timeout: float | None, retries: int, cacert: Path | None, insecure: bool
) -> Client:
    """Return the client of an app.

    Raises:
        ConfigurationError: ``target`` is no URL.
    """
    if target != "localhost" and _APP_NAME.fullmatch(target):
        raise ConfigurationError(
            f"target {target!r} is not a URL; apps of a cluster cannot be named yet: forward its port with "
            f"`kubectl port-forward service/{target.rpartition('/')[2]} 8080` and pass localhost:8080"
        )
    if target.endswith((".py", ".yaml", ".yml")) or Path(target).is_file():
        raise ConfigurationError(
            f"target {target!r} is a file; start it with `drumline run {target}`, then pass its URL"
        )
    verify = str(cacert) if cacert is not None else not insecure
    return Client(target, api_key=api_key, timeout=timeout, retries=retries, verify=verify)

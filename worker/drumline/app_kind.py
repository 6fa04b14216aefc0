"""Tells an App from a worker without importing what either needs."""

from __future__ import annotations


def kind_of(cls: type) -> str:
    """Return ``app`` for a subclass of ``drumline.App``, else ``worker``."""
    names = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
    return "app" if "drumline.app.App" in names else "worker"

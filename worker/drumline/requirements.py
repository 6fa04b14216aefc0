"""Compares an App's ``requirements`` with what is installed. Nothing is ever installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

#: fal's own package: this one takes its place.
_OURS = frozenset({"fal"})


def differences(requirements: Iterable[Any]) -> list[str]:
    """Describe every requirement that the installed packages do not meet.

    Args:
        requirements: pip's requirement strings, possibly in nested lists. Options (``--extra-index-url`` and its
            value), URLs and paths say nothing about a version and are skipped.

    Returns:
        e.g. ``torch==2.6.0+cu124 (installed: 2.11.0)``, ``opencv-python (not installed)``.
    """
    found = []
    for line in _flat(requirements):
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name.lower() in _OURS or requirement.url:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{line} (not installed)")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{line} (installed: {installed})")
    return found


def _flat(requirements: Iterable[Any]) -> Iterator[str]:
    for item in requirements:
        if not isinstance(item, str):
            yield from _flat(item)
            continue
        line = item.partition(" #")[0].strip()
        if line and not line.startswith("-"):
            yield line

"""Kubernetes quantities, such as ``64Gi`` or ``500m``. PURE."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_FORM: Final = re.compile(r"([+-]?[0-9]+(?:\.[0-9]*)?|[+-]?\.[0-9]+)(?:([eE][+-]?[0-9]+)|([numkMGTPE]|[KMGTPE]i))?")
_SUFFIXES: Final = {
    **{
        suffix: Decimal(1000) ** power
        for power, suffix in enumerate(["n", "u", "m", "", "k", "M", "G", "T", "P", "E"], -3)
    },
    **{suffix: Decimal(1024) ** power for power, suffix in enumerate(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"], 1)},
}


def parse(value: str | int | float) -> Decimal:
    """Return ``value`` as a number.

    Raises:
        ValueError: it is no quantity.
    """
    found = _FORM.fullmatch(str(value))
    if found is None:
        raise ValueError(f"{value!r} is no quantity; write e.g. 8, 500m or 64Gi")
    number, exponent, suffix = found.groups()
    return Decimal(number + exponent) if exponent else Decimal(number) * _SUFFIXES[suffix or ""]


def same(one: object, other: object) -> bool:
    """Whether both are quantities of the same size, however they are written."""
    if not isinstance(one, str | int | float) or not isinstance(other, str | int | float):
        return False
    try:
        return parse(one) == parse(other)
    except ValueError:
        return False


def times(value: str | int, count: int) -> str:
    """Return ``count`` times ``value``, in bytes or in the unit of ``value``."""
    found = _FORM.fullmatch(str(value))
    if found and found[3] and "." not in found[1]:
        return f"{int(found[1]) * count}{found[3]}"
    return str(int(parse(value) * count))

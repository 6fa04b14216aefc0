"""Arguments that become JSON: ``KEY=VALUE``, ``@file``, whole objects."""

from __future__ import annotations

import base64
import json
import mimetypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drumline.errors import ConfigurationError


def parse(arguments: Sequence[str], what: str = "the request") -> dict[str, Any]:
    """Return the JSON object that ``arguments`` make together; later ones win.

    Args:
        arguments: ``{...}``, ``KEY=VALUE``, ``KEY=@file``, ``@file.json`` or ``-`` (standard input).
        what: what the object is, for error messages.

    Raises:
        ConfigurationError: one of them is none of these.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        if argument == "-":
            values |= _object(sys.stdin.buffer.read(), "standard input")
        elif argument.startswith("@"):
            values |= _object(_read(argument[1:]), argument[1:])
        elif argument.lstrip().startswith(("{", "[")):
            values |= _object(argument.encode(), f"argument {_short(argument)}")
        else:
            key, equals, text = argument.partition("=")
            if not equals or not key:
                raise ConfigurationError(
                    f"{what}: {_short(argument)} is neither JSON nor KEY=VALUE; write e.g. prompt='a lighthouse'"
                )
            values[key] = file_value(text[1:]) if text.startswith("@") else value(text)
    return values


def value(text: str) -> Any:
    """Return ``text`` as JSON if it is, else as it is; ``'"7"'`` is a text, ``7`` a number."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def file_value(name: str) -> Any:
    """Return a file's content as JSON can hold it: a ``.json`` file's value, a text, or a data URI of anything else."""
    data = _read(name)
    if name.endswith(".json"):
        return _json(data, name)
    media = mimetypes.guess_type(name)[0]
    if media is None or media.startswith("text/"):
        try:
            return data.decode()
        except UnicodeDecodeError:
            pass
    return f"data:{media or 'application/octet-stream'};base64,{base64.b64encode(data).decode()}"


def _object(data: bytes, where: str) -> dict[str, Any]:
    found = _json(data, where)
    if not isinstance(found, dict):
        raise ConfigurationError(f'{where}: a JSON object is needed, such as {{"prompt": "a lighthouse"}}')
    return found


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where}: not JSON: {error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read(name: str) -> bytes:
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise ConfigurationError(f"@{name}: {error.strerror}") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")

"""Strings of a form: what they look like, and what to write instead of one that is wrong. LEAF.

Each form is one pattern and one sentence. Models raise the sentence, and the CustomResourceDefinitions that are made from
them say it, too (``drumline_operator.schema``), so that nobody has to read a regular expression. Patterns are in the
syntax that Python, Go and Rust share.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema
from pydantic.config import JsonDict

#: Key of the sentence in a JSON schema.
CURE: Final = "x-cure"
#: Of a number or quantity: characters, and the largest number that JSON carries everywhere.
_LONGEST_NUMBER: Final = 32
_LARGEST: Final = (1 << 53) - 1


def _matcher(pattern: str, cure: str) -> Callable[[str], str]:
    compiled = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if compiled.fullmatch(text) is None:
            raise ValueError(cure)
        return text

    return check


def _form(pattern: str, cure: str, longest: int) -> tuple[Any, Any]:
    """Validator and schema of a string; ``longest``: characters, which also bound what the check costs a server."""
    extra: JsonDict = {"pattern": pattern, CURE: cure}
    return AfterValidator(_matcher(pattern, cure)), Field(max_length=longest, json_schema_extra=extra)


def _number_or_form(pattern: str, cure: str) -> tuple[Any, Any]:
    """Validator and schema of a number that is not negative, or a string."""
    matches = _matcher(pattern, cure)

    def check(value: object) -> int | str:
        if isinstance(value, str) and len(value) <= _LONGEST_NUMBER:
            return matches(value)
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise ValueError(cure)
        return value

    parts = [
        {"type": "integer", "minimum": 0, "maximum": _LARGEST},
        {"type": "string", "pattern": pattern, "maxLength": _LONGEST_NUMBER},
    ]
    return PlainValidator(check), WithJsonSchema({"anyOf": parts, CURE: cure})


#: One folder of a path: not "..".
_FOLDER: Final = r"([^/.][^/]*|\.[^/.][^/]*|\.\.[^/]+|\.)"
_LABEL: Final = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"

_QUANTITY: Final = r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+|[numkMGTPE]|[KMGTPE]i)?$"
Amount = Annotated[int | str, *_number_or_form(_QUANTITY, "write a number or a quantity, e.g. 8, 500m or 64Gi")]
IntOrPercent = Annotated[
    int | str, *_number_or_form("^(100|[1-9]?[0-9])%$", "write a number of pods or a percentage, e.g. 1 or 25%")
]

ObjectName = Annotated[
    str,
    *_form(
        f"^{_LABEL}(\\.{_LABEL})*$",
        "write the object's name: a-z, 0-9, '-' and '.', a letter or digit at its ends",
        253,
    ),
]
AppName = Annotated[
    str,
    *_form(
        "^[a-z]([-a-z0-9]*[a-z0-9])?$",
        "a name begins with a letter and holds only a-z, 0-9 and '-' (a Service gets it); rename it",
        48,
    ),
]
MachineName = Annotated[
    str,
    *_form("^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", "write a name of letters, digits, '-', '_' and '.'", 63),
]
ResourceName = Annotated[
    str,
    *_form(
        f"^{_LABEL}(\\.{_LABEL})*/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        "write an extended resource with its domain, e.g. nvidia.com/gpu",
        253,
    ),
]
VariableName = Annotated[
    str, *_form("^[-._A-Za-z][-._A-Za-z0-9]*$", "write a variable's name: letters, digits, '_', '-' and '.'", 253)
]
ClassReference = Annotated[
    str,
    *_form(
        r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        "write module:Class, e.g. app:Worker for the class Worker in app.py",
        253,
    ),
]
Image = Annotated[str, *_form(r"^\S+$", "write a container image without spaces, e.g. ghcr.io/acme/sdxl:1.0", 512)]
GitUrl = Annotated[
    str,
    *_form(
        "^(https?://|ssh://|git://|[^@/ ]+@[^:/ ]+:)[^ ]+$", "write an https:// or ssh:// URL, or user@host:path", 2048
    ),
]
GitRevision = Annotated[
    str, *_form(r"^[^-\s]\S*$", "write a commit, tag or branch: no spaces, and no '-' at its beginning", 255)
]
FolderInside = Annotated[
    str, *_form(f"^{_FOLDER}(/{_FOLDER})*/?$", "write a folder inside of it, e.g. src/app: no '/' first, no '..'", 1024)
]
AbsolutePath = Annotated[str, *_form("^(/[^/:]+)+/?$", "write an absolute path without ':', e.g. /data", 1024)]

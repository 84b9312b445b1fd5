"""JSON as QEMU's tools print it: four spaces, and keys in the order of QEMU's hash table."""

from __future__ import annotations

import json
import re
from typing import Any

from cowhand.block.node import naming

_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*\\u)([0-9a-f]{4})")

#: A line that holds an empty list or object: the closing bracket has a line of its own.
_EMPTY = re.compile(r'^( *)("(?:[^"\\]|\\.)*": )?([\[{])([\]}])', re.MULTILINE)
#: A byte that is not UTF-8, as Python holds it.
_UNDECODABLE = re.compile("[\udc80-\udcff]")


def ordered(value: Any) -> Any:
    """Return *value* in QEMU's order, and with what is no text replaced."""
    return _decodable(naming.ordered(value))


def _decodable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decodable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decodable(item) for item in value]
    return _UNDECODABLE.sub("\ufffd", value) if isinstance(value, str) else value


def render(value: Any) -> str:
    """Return the document of *value*, without a line end."""
    text = _EMPTY.sub(r"\1\2\3\n\1\4", json.dumps(ordered(value), indent=4))
    return _ESCAPE.sub(lambda found: found[1] + found[2].upper(), text.replace("\x7f", "\\u007f"))

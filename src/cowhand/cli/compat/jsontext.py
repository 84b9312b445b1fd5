"""JSON as QEMU's tools print it: four spaces, and keys in the order of QEMU's hash table.

QEMU keeps an object's members in 512 chained buckets, chosen by a hash of the name that comes from TDB; they are printed bucket by bucket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BUCKETS = 512
_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*\\u)([0-9a-f]{4})")

#: A line that holds an empty list or object: the closing bracket has a line of its own.
_EMPTY = re.compile(r'^( *)("(?:[^"\\]|\\.)*": )?([\[{])([\]}])', re.MULTILINE)
#: A byte that is not UTF-8, as Python holds it.
_UNDECODABLE = re.compile("[\udc80-\udcff]")


def bucket(key: str) -> int:
    """Return the bucket that *key* falls into."""
    data = key.encode()
    value = 0x238F13AF * len(data)
    for index, byte in enumerate(data):
        value = (value + (byte << (index * 5 % 24))) & 0xFFFFFFFF
    return (1103515243 * value + 12345 & 0xFFFFFFFF) % _BUCKETS


def ordered(value: Any) -> Any:
    """Return *value* with the members of every object in the hash table's order.

    Of two in one bucket the one that was put in later comes first.
    """
    if isinstance(value, Mapping):
        keys = list(value)
        keys.reverse()
        return {key: ordered(value[key]) for key in sorted(keys, key=bucket)}
    if isinstance(value, (list, tuple)):
        return [ordered(item) for item in value]
    if isinstance(value, str):
        return _UNDECODABLE.sub("\ufffd", value)
    return value


def render(value: Any) -> str:
    """Return the document of *value*, without a line end."""
    text = _EMPTY.sub(r"\1\2\3\n\1\4", json.dumps(ordered(value), indent=4))
    return _ESCAPE.sub(lambda found: found[1] + found[2].upper(), text.replace("\x7f", "\\u007f"))

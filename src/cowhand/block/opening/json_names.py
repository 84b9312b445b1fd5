"""``json:`` names: a node's description written as JSON, in QEMU's dialect (QEMU ``qobject/json-lexer.c`` describes it).

The dialect has strings in single quotes as well. QEMU keeps an object's members in 512 chained buckets, chosen by a hash of the name that comes
from TDB; it prints them bucket by bucket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cowhand.core.errors import InvalidArgument

PREFIX = "json:"
#: Nobody writes a longer description; reading one takes time in proportion.
MAX_LENGTH = 1 << 20
_BUCKETS = 512
_STRING = re.compile(r"""("(?:[^"\\]|\\.)*")|'((?:[^'\\]|\\.)*)'""", re.DOTALL)
_QUOTE = re.compile(r"""\\'|"|\\.""", re.DOTALL)
_SINGLE = {"\\'": "'", '"': '\\"'}


def parse_json_name(name: str) -> dict[str, Any]:
    """Return the description in *name*, which begins with "json:". Raises InvalidArgument."""
    text = name.removeprefix(PREFIX)
    where = name[:200]
    if len(text) > MAX_LENGTH:
        raise InvalidArgument("Could not parse the JSON options: the description is too long", path=where)
    try:
        given = json.loads(_STRING.sub(_in_double_quotes, text))
    except RecursionError:
        raise InvalidArgument(
            "Could not parse the JSON options: JSON parse error, nested too deep", path=where
        ) from None
    except ValueError as error:
        if not text.strip():
            raise InvalidArgument("Could not parse the JSON options: Expecting a JSON value", path=where) from None
        rest = text[getattr(error, "pos", 0) :].strip()
        reason = str(error) if rest else "premature EOI"
        raise InvalidArgument(f"Could not parse the JSON options: JSON parse error, {reason}", path=where) from None
    if not isinstance(given, dict):
        raise InvalidArgument("Invalid JSON object given", path=where)
    return given


def _in_double_quotes(match: re.Match[str]) -> str:
    if match[1] is not None:
        return match[1]
    return '"' + _QUOTE.sub(lambda found: _SINGLE.get(found[0], found[0]), match[2]) + '"'


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
    return value

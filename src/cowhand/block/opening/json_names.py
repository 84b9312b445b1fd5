"""``json:`` names: a node's description written as JSON, in QEMU's dialect (QEMU ``qobject/json-lexer.c`` describes it).

The dialect has strings in single quotes as well. :mod:`cowhand.block.node.naming` writes such names.
"""

from __future__ import annotations

import json
import re
from typing import Any

from cowhand.core.errors import InvalidArgument

PREFIX = "json:"
#: Nobody writes a longer description; reading one takes time in proportion.
MAX_LENGTH = 1 << 20
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
        given = json.loads(in_double_quotes(text))
    except RecursionError:
        raise InvalidArgument(
            "Could not parse the JSON options: JSON parse error, nested too deep", path=where
        ) from None
    except ValueError as error:
        if not text.strip():
            raise InvalidArgument("Could not parse the JSON options: Expecting a JSON value", path=where) from None
        rest = text[getattr(error, "pos", 0) :].strip()
        reason = f"stray '{rest[:40]}'" if rest else "premature EOI"
        raise InvalidArgument(f"Could not parse the JSON options: JSON parse error, {reason}", path=where) from None
    if not isinstance(given, dict):
        raise InvalidArgument("Invalid JSON object given", path=where)
    return given


def in_double_quotes(text: str) -> str:
    """Return *text* with every string in single quotes, which the dialect has as well, in double ones."""
    return _STRING.sub(_in_double_quotes, text)


def _in_double_quotes(match: re.Match[str]) -> str:
    if match[1] is not None:
        return match[1]
    return '"' + _QUOTE.sub(lambda found: _SINGLE.get(found[0], found[0]), match[2]) + '"'

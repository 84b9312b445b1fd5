"""QMP on the wire: a stream of JSON values in, lines of JSON out (QEMU ``docs/interop/qmp-spec``, ``qobject/json-lexer.c``).

No I/O here: bytes go in by :meth:`Parser.feed`, and values or errors come out. Input is not lines: a value may come in any number of
pieces, and several in one. Strings in single quotes are strings as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cowhand.block.node.naming import ordered
from cowhand.block.opening.json_names import in_double_quotes
from cowhand.core.errors import InvalidArgument

#: QEMU's limits on one value.
MAX_BYTES = 64 << 20
MAX_NESTING = 1024

_SPACE = b" \t\r\n"
_OPEN = frozenset(b"[{")
_CLOSE = frozenset(b"]}")
_QUOTES = frozenset(b"\"'")
_ENDS = frozenset(b" \t\r\n[]{},:\"'")


class SyntaxProblem(InvalidArgument):
    """What was received is no JSON."""

    code = "qmp-syntax"


class Parser:
    """Cuts a stream into JSON values. After an error what was received of the bad value is dropped, and the stream goes on."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = 0  #: up to where the value was looked at
        self._depth = 0
        self._quote = 0
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take *data* and yield each value that is complete, or a SyntaxProblem in its place."""
        self._data += data
        while True:
            end = self._find_end()
            if isinstance(end, SyntaxProblem):
                self._reset(len(self._data))
                yield end
                return
            if end is None:
                return
            text = bytes(self._data[:end])
            self._reset(end)
            if text.strip(_SPACE):
                yield _value(text)

    def _reset(self, end: int) -> None:
        del self._data[:end]
        self._at = self._depth = self._quote = 0
        self._escaped = False

    def _find_end(self) -> int | SyntaxProblem | None:
        data, at = self._data, self._at
        while at < len(data):
            byte = data[at]
            if self._quote:
                if self._escaped:
                    self._escaped = False
                elif byte == 0x5C:
                    self._escaped = True
                elif byte == self._quote:
                    self._quote = 0
                    if not self._depth:
                        return at + 1
            elif byte in _QUOTES:
                self._quote = byte
            elif byte in _OPEN:
                self._depth += 1
                if self._depth > MAX_NESTING:
                    return SyntaxProblem("JSON nesting depth limit exceeded")
            elif byte in _CLOSE:
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
            elif byte not in _SPACE and not self._depth:
                # A bare word: it ends where something else begins.
                stop = next((i for i in range(at, len(data)) if data[i] in _ENDS), None)
                if stop is None:
                    break
                return max(stop, at + 1)
            at += 1
        self._at = at
        if len(data) > MAX_BYTES:
            return SyntaxProblem("JSON token size limit exceeded")
        return None


def _value(text: bytes) -> Any:
    try:
        return json.loads(in_double_quotes(text.decode("utf-8")), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return SyntaxProblem("JSON parse error, invalid UTF-8 sequence in string")
    except RecursionError:
        return SyntaxProblem("JSON nesting depth limit exceeded")
    except _Duplicate:
        return SyntaxProblem("JSON parse error, duplicate key")
    except ValueError as error:
        at = getattr(error, "pos", 0)
        word = text.decode("utf-8", "replace").strip()[at : at + 20].split(" ")[0]
        return SyntaxProblem(
            f"JSON parse error, invalid keyword '{word}'" if word.isalpha() else "JSON parse error, expecting value"
        )


class _Duplicate(ValueError):
    """A member of an object was given twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Duplicate
    return found


def encode(value: Mapping[str, Any], *, pretty: bool = False) -> bytes:
    """Return *value* as QEMU sends it: members in the order of its hash table, ASCII alone, a line that ends in CR and LF."""
    return json.dumps(ordered(value), indent=4 if pretty else None).encode() + b"\r\n"

"""Spelling in ASCII what a stream's encoding lacks: not every terminal and log speaks UTF-8."""

from __future__ import annotations

import codecs
import sys

_HANDLER = "cowhand.spelling"
_ASCII = {
    "·": ".",
    "…": "...",
    "→": "->",
    "█": "#",
    "▒": "%",
    "░": "z",
    **dict.fromkeys("▁▂▃▄▅▆▇", "+"),
    **dict.fromkeys("─━", "-"),
    "│": "|",
    **dict.fromkeys("├└", "+"),
}


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what is written instead of the characters of *error*, and where to go on: a handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if character in _ASCII:
        return _ASCII[character], error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )


def settle() -> None:
    """Let standard output and standard error spell what their encodings lack, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        encoding = getattr(stream, "encoding", None) or ""
        if encoding.lower().replace("-", "") != "utf8" and hasattr(stream, "reconfigure"):
            codecs.register_error(_HANDLER, _spelled)
            stream.reconfigure(errors=_HANDLER)

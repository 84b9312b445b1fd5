"""Errors of the library in the words of later versions. The library's own ``qemu`` texts are those of 7.2.

Source: the messages of QEMU 10.0's and 11.1's tools.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cowhand.cli.compat import profiles

_NOT_CREATED = (
    "does not support creating new images, so an existing image must be selected as the target; "
    "however, opening the given target as an existing image failed: "
)


def _json_end(match: re.Match[str]) -> str:
    """Say where a JSON description ends too early: line and column from 1 on, as since 11."""
    return f"{match[1]}{end_place(match[2])}: JSON parse error, premature end of input"


def end_place(text: str) -> str:
    """Return "LINE:COLUMN" of the end of *text*."""
    return f"{text.count(chr(10)) + 1}:{len(text) - text.rfind(chr(10))}"


#: (version since which, what the library says, what is said then)
_LATER: tuple[tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (
        "8.2",
        re.compile(r"(Protocol driver '\w+') does not support image creation, and opening the image failed: "),
        rf"\1 {_NOT_CREATED}",
    ),
    ("9.2", re.compile(r"Could not dup FD for (\S+) flags [0-9a-f]+: "), r"Could not open '\1': "),
    (
        "11",
        re.compile(r"(blkdebug:([^:\s]+):\S+: )Could not read blkdebug config file: "),
        r"\1Could not open '\2': ",
    ),
    (
        "11",
        re.compile(
            r"((?:Could not open '|can't open device )json:(.*?)'?: Could not parse the JSON options: )JSON parse error, premature EOI",
            re.DOTALL,
        ),
        _json_end,
    ),
)


def in_words_of(profile: str, message: str) -> str:
    """Return *message*, which is 7.2's, as *profile* says it."""
    asked = profiles.number(profile)
    for since, pattern, replacement in _LATER:
        if asked >= profiles.number(since):
            message = pattern.sub(replacement, message)
    return message

"""Numbers, patterns and options of the I/O tool's commands, with its words for what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import Grammar, OptionError
from cowhand.cli.compat.sizes import SizeRange, SizeSyntax, parse_size

SECTOR = 512
#: The longest request, 2 GiB less a sector (QEMU's BDRV_REQUEST_MAX_BYTES).
MAX_REQUEST = 2147483136
_C_INTEGER = re.compile(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))\Z")


class Complaint(Exception):
    """A command fails; the message, if there is one, goes to standard output, without the tool's name."""


class UsageComplaint(Complaint):
    """A command was used wrongly: its usage is shown."""


def options(
    words: Sequence[str], short: str, positional: list[str], *, registered: bool = False
) -> list[tuple[str, str]]:
    """Return the options of a command line and fill *positional*. Raises UsageComplaint after the C library's message."""
    if registered and program.since("8.2"):
        short += "r"  # buffers registered before: nothing changes here
    scanner = Grammar(short).scan(words)
    try:
        found = list(scanner)
    except OptionError as error:
        program.plain(error.in_libc_words(words[0]))
        raise UsageComplaint from None
    positional.extend(scanner.rest)
    return found


def number(text: str, *, shown: str | None = None) -> int:
    """Return the size or offset that *text* names; a complaint tells of *shown* instead, where that is given."""
    shown = text if shown is None else shown
    try:
        return parse_size(text)
    except SizeSyntax:
        raise Complaint(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {shown}") from None
    except SizeRange:
        raise Complaint(f"Parsing error: argument too large -- {shown}") from None


def c_integer(text: str) -> int | None:
    """Return the integer that strtol reads in *text* (decimal, 0x, 0 for octal), None when there is something else."""
    match = _C_INTEGER.match(text)
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    return -value if sign == "-" else value


def pattern(text: str) -> int:
    """Return the byte that *text* names."""
    value = c_integer(text)
    if value is None or not 0 <= value <= 255:
        raise Complaint(f"{text} is not a valid pattern byte")
    return value


def aligned(value: int, what: str) -> None:
    """Refuse a *value* that is no multiple of a sector."""
    if value % SECTOR:
        raise Complaint(f"{value} is not a sector-aligned value for '{what}'")


def lengths(words: Sequence[str]) -> list[int]:
    """Return the lengths of a request in several parts."""
    found = []
    total = 0
    for text in words:
        value = number(text)
        if value > MAX_REQUEST:
            raise Complaint(f"Argument '{text}' exceeds maximum size {MAX_REQUEST}")
        if total > MAX_REQUEST - value:
            raise Complaint(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
        total += value
        found.append(value)
    return found

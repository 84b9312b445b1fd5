"""Sizes as QEMU's tools read and print them.

Read: digits, a fraction only together with a suffix that makes it whole, or hexadecimal; one suffix b, k, M, G, T, P, E of either case.
Printed: "64 KiB" with three digits by the image tool, "1.500 KiB" by the I/O tool.
"""

from __future__ import annotations

import re

from cowhand.cli.compat import program
from cowhand.cli.compat.program import Failure

MAX_SIZE = (1 << 63) - 1
MAX_UNSIGNED = (1 << 64) - 1
_SHIFTS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_PREFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DIGITS = "0123456789"
_C_NUMBER = re.compile(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))")
_HEX = "0123456789abcdefABCDEF"

#: What is printed below "Parameter 'X' expects a non-negative number below 2^64".
SUFFIX_HINT = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."


class SizeSyntax(ValueError):
    """Not a number, or with something behind it."""


class SizeRange(ValueError):
    """2^64 or more."""


def _span(text: str, start: int, allowed: str) -> int:
    while start < len(text) and text[start] in allowed:
        start += 1
    return start


def parse_unsigned_size(text: str) -> int:
    """Return the number of bytes below 2^64 that *text* names. Raises SizeSyntax, SizeRange."""
    body = text.lstrip(" \t\n\v\f\r").removeprefix("+")
    modern = program.since("8.2")
    if modern and body.startswith("-"):
        digits = _span(body, 1, _DIGITS)
        raise SizeRange(text) if 1 < digits == len(body) else SizeSyntax(text)
    fraction = ""
    if body[:2] in ("0x", "0X"):
        end = _span(body, 2, _HEX)
        if end == 2:
            raise SizeSyntax(text)
        value = int(body[2:end], 16)
        suffix = body[end:]
        if suffix and suffix.lower() in _SHIFTS:
            if modern:
                raise SizeSyntax(text)
            program.warning(f"Using a multiplier suffix on hex numbers is deprecated: {text}")
    else:
        end = _span(body, 0, _DIGITS)
        if not end and not (modern and body[:1] == "." and body[1:2] in tuple(_DIGITS)):
            raise SizeSyntax(text)
        value = 0 if not end else int(body[:end]) if end <= 40 else MAX_UNSIGNED + 1
        if body[end : end + 1] == ".":
            begin, end = end + 1, _span(body, end + 1, _DIGITS)
            fraction = body[begin:end]
        suffix = body[end:]
    if suffix and suffix.lower() not in _SHIFTS:
        raise SizeSyntax(text)
    shift = _SHIFTS[suffix.lower()] if suffix else 0
    part = float(f"0.{fraction}") if fraction else 0.0
    if part and not shift:
        raise SizeSyntax(text)
    total = (value << shift) + int(part * (1 << shift) + 0.5)
    if value > MAX_UNSIGNED or total > MAX_UNSIGNED:
        raise SizeRange(text)
    return total


def parse_size(text: str) -> int:
    """The same below 2^63."""
    value = parse_unsigned_size(text)
    if value > MAX_SIZE:
        raise SizeRange(text)
    return value


def size_argument(what: str, text: str, lowest: int = 0, highest: int = MAX_SIZE) -> int:
    """Return the size that the argument called *what* names, or fail as the image tool does."""
    try:
        value = parse_unsigned_size(text)
        if lowest <= value <= highest:
            return value
    except SizeSyntax:
        if program.since("10.0"):
            raise Failure(_invalid(what, text)) from None
        program.error(f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for")
        raise Failure("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.") from None
    except SizeRange:
        pass
    raise Failure(f"Invalid {what} specified. Must be between {lowest} and {highest}.")


def _invalid(what: str, text: str) -> str:
    return f"Invalid {what} specified: '{text}'{'.' if program.is_debian_10_0() else ''}"


def number_argument(what: str, text: str, lowest: int, highest: int) -> int:
    """Return the plain number that the argument called *what* names, or fail as the image tool does since 10.0."""
    match = _C_NUMBER.fullmatch(text)
    if match is None:
        raise Failure(_invalid(what, text))
    sign, hexadecimal, octal, decimal = match.groups()
    value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    if not lowest <= (-value if sign == "-" else value) <= highest:
        raise Failure(f"Invalid {what} specified. Must be between {lowest} and {highest}.")
    return value


def size_option(option: str, text: str) -> int:
    """Return the size that the value *text* of *option* names, or fail in the words of QEMU's option parser."""
    try:
        return parse_unsigned_size(text)
    except SizeSyntax:
        raise Failure(f"Parameter '{option}' expects a non-negative number below 2^64", hint=SUFFIX_HINT) from None
    except SizeRange:
        raise Failure(f"Value '{text}' is out of range for parameter '{option}'") from None


def human(value: int) -> str:
    """Return "192 KiB": three significant digits, the next unit from 1000 on."""
    unit = 0
    while unit < len(_PREFIXES) - 1 and value * 1024 >= 1000 * 1024 ** (unit + 1):
        unit += 1
    return f"{value / 1024**unit:.3g} {_PREFIXES[unit]}B"


def precise(value: float) -> str:
    """Return "1.500 KiB" or "64 KiB": three decimals, or none when they are zeroes; below 1 KiB "512 bytes"."""
    unit = 0
    while unit < len(_PREFIXES) - 1 and value >= 1024 ** (unit + 1):
        unit += 1
    if unit == 0:
        return f"{value:g} bytes"
    return f"{value / 1024**unit:.3f}".removesuffix(".000") + f" {_PREFIXES[unit]}B"

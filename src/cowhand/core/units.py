"""Sizes: "10G" in, "10 GiB" out. All suffixes are powers of 1024, as in QEMU."""

from __future__ import annotations

import re

from cowhand.core.errors import InvalidArgument

_SUFFIX = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_NUMBER = re.compile(
    r"\s*(0[xX][0-9a-fA-F]+|\d+(?:\.\d*)?|\.\d+)\s*([bBkKmMgGtTpPeE]?)(?:(?<=[kKmMgGtTpPeE])i?[bB])?\s*\Z"
)

#: Ours: longer numbers are refused without looking at their value (Python itself refuses to convert very long ones).
_MAX_DIGITS = 128

#: The largest size that a disk may have: offsets are signed 64-bit numbers everywhere below.
MAX_SIZE = (1 << 63) - 512


def parse_size(text: str | int) -> int:
    """Return the number of bytes that *text* names ("1.5G", "0x100000", "10 GiB", 4096).

    A fraction needs a suffix that makes it whole or is rounded down, as QEMU does. Raises InvalidArgument.
    """
    if isinstance(text, int):
        value = text
    else:
        match = _NUMBER.match(text)
        if match is None:
            raise InvalidArgument(
                f"'{text}' is not a size",
                hint="Write a number with an optional suffix k, M, G, T, P or E, such as 512M or 1.5G.",
            )
        number, suffix = match.group(1), (match.group(2) or "").lower()
        if len(number) > _MAX_DIGITS:
            raise InvalidArgument(f"size {text[:_MAX_DIGITS]}… is out of range", hint="Sizes lie between 0 and 8 EiB.")
        shift = _SUFFIX[suffix]
        if number[:2] in ("0x", "0X"):
            value = int(number, 16) << shift
        elif "." in number:
            whole, _, fraction = number.partition(".")
            value = (int(whole or 0) << shift) + (int(fraction or 0) << shift) // 10 ** len(fraction)
        else:
            value = int(number) << shift
    if not 0 <= value <= MAX_SIZE:
        raise InvalidArgument(f"size {text} is out of range", hint="Sizes lie between 0 and 8 EiB.")
    return value


def format_size(value: int) -> str:
    """Return *value* bytes for people, with three significant digits: "192 KiB", "20.7 MiB", "0 B"."""
    amount = float(value)
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1000 or (amount < 1024 and suffix == "B"):
            return f"{amount:.3g} {suffix}" if amount < 1000 else f"{int(amount)} {suffix}"
        if amount < 1024:
            return f"{amount:.0f} {suffix}"
        amount /= 1024
    return f"{amount:.3g} EiB"

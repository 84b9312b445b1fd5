"""What a VHD image names (Microsoft "Virtual Hard Disk Image Format Specification", "Dynamic Disk Header"): a differencing disk's parent."""

from __future__ import annotations

from cowhand.block.links.records import BACKING, Link, Reader
from cowhand.core.errors import InvalidFormat

_FOOTER = 512
_DIFFERENCING = 4
_LOCATORS, _LOCATOR_SIZE, _LOCATOR_COUNT = 576, 24, 8
_RELATIVE, _ABSOLUTE = b"W2ru", b"W2ku"
_MAX_NAME = 4096


def links(reader: Reader) -> list[Link]:
    """Return what the image names. Raises InvalidFormat where that cannot be known, OSError."""
    if reader.number(60, 4) != _DIFFERENCING:
        return []
    header = reader.number(16, 8)
    if reader.read(header, 8) != b"cxsparse":
        raise InvalidFormat("the header of a differencing disk is not where it should be", path=reader.path, offset=16)
    names = []
    for number in range(_LOCATOR_COUNT):
        at = header + _LOCATORS + number * _LOCATOR_SIZE
        if reader.read(at, 4) not in (_RELATIVE, _ABSOLUTE):
            continue
        length, offset = reader.number(at + 8, 4), reader.number(at + 16, 8)
        if length <= _MAX_NAME:
            names.append(reader.read(offset, length).decode("utf-16-le", "surrogateescape"))
    names.append(reader.read(header + 64, 512).decode("utf-16-be", "replace").split("\0", 1)[0])
    found = [Link(BACKING, name.replace("\\", "/").removeprefix("./"), "vpc") for name in dict.fromkeys(names) if name]
    if not found:
        raise InvalidFormat("the parent of the differencing disk has no name", path=reader.path)
    return found

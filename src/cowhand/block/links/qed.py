"""What a QED image names (QEMU ``docs/interop/qed_spec``, "Header")."""

from __future__ import annotations

import os

from cowhand.block.links.records import BACKING, Link, Reader
from cowhand.core.errors import InvalidFormat

_MAX_NAME = 1023  #: QEMU's limit
_FEATURE_BACKING, _FEATURE_RAW = 1 << 0, 1 << 2


def links(reader: Reader) -> list[Link]:
    """Return what the image names. Raises InvalidFormat where that cannot be known, OSError."""
    features = reader.number(16, 8, little=True)
    if not features & _FEATURE_BACKING:
        return []
    offset, length = reader.number(56, 4, little=True), reader.number(60, 4, little=True)
    if not length or length > _MAX_NAME:
        raise InvalidFormat(f"a backing file's name of {length} bytes is impossible", path=reader.path, offset=60)
    name = os.fsdecode(reader.read(offset, length).split(b"\0", 1)[0])
    return [Link(BACKING, name, "raw" if features & _FEATURE_RAW else None)]

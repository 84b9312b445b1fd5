"""What a VMDK image names (VMware "Virtual Disk Format 5.0", "The Descriptor File"): its parent, and the files of its extents."""

from __future__ import annotations

import os
import re

from cowhand.block.links.records import BACKING, EXTENT, Link, Reader
from cowhand.core.errors import InvalidFormat

_SECTOR = 512
#: Bytes of a descriptor that are looked at; QEMU reads 20 sectors of an embedded one.
_MAX_DESCRIPTOR = 1 << 20
_PARENT = re.compile(rb'^[ \t]*parentFileNameHint[ \t]*=[ \t]*"([^"\r\n]*)"', re.MULTILINE)
_EXTENT = re.compile(rb'^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+\d+[ \t]+\w+[ \t]+"([^"\r\n]+)"', re.MULTILINE)
_CHILD = re.compile(rb"^[ \t]*parentCID[ \t]*=[ \t]*([0-9a-fA-F]+)", re.MULTILINE)
_NO_PARENT = 0xFFFFFFFF


def links(reader: Reader) -> list[Link]:
    """Return what the image names. Raises InvalidFormat where that cannot be known, OSError."""
    magic = reader.read(0, 4)
    if magic == b"COWD":
        return []  # an extent: what names its parent is the descriptor beside it
    embedded = magic == b"KDMV"
    if embedded:
        offset = reader.number(28, 8, little=True) * _SECTOR
        length = reader.number(36, 8, little=True) * _SECTOR
        if not offset or not length:
            return []  # the same
        text = reader.read(offset, min(length, _MAX_DESCRIPTOR))
    else:
        text = reader.read(0, min(reader.size, _MAX_DESCRIPTOR))
    text = text.split(b"\0", 1)[0]
    found = []
    parent = _PARENT.search(text)
    if parent is not None:
        found.append(Link(BACKING, os.fsdecode(parent[1]), "vmdk"))
    else:
        child = _CHILD.search(text)
        if child is not None and int(child[1], 16) & _NO_PARENT != _NO_PARENT:
            raise InvalidFormat("the parent of the image has no name", path=reader.path)
    if not embedded:  # an embedded descriptor's one extent is its own file
        found += [Link(EXTENT, os.fsdecode(match[1])) for match in _EXTENT.finditer(text)]
    return found

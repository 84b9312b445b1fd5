"""What a qcow2 image names (QEMU ``docs/interop/qcow2``, "Header", "Header extensions").

Only the fields of the names are looked at: an image with damaged tables names its backing file all the same. The old qcow (version 1) has the
same fields at the same places.
"""

from __future__ import annotations

import os

from cowhand.block.links.records import BACKING, DATA_FILE, Link, Reader
from cowhand.core.errors import InvalidFormat

_MAX_NAME = 1023  #: the specification's limit
_VERSION_2_LENGTH, _VERSION_3_MIN, _VERSION_3_MAX = 72, 104, 1 << 21
_MAX_CLUSTER_BITS = 21
_EXTENSION_FORMAT, _EXTENSION_DATA_FILE = 0xE2792ACA, 0x44415441
_INCOMPATIBLE_DATA_FILE = 1 << 2
#: Extensions that are stepped over before the header is given up: real ones have five.
_MAX_EXTENSIONS = 4096


def links(reader: Reader) -> list[Link]:
    """Return what the image names. Raises InvalidFormat where that cannot be known, OSError."""
    version = reader.number(4, 4)
    if version not in (1, 2, 3):
        raise InvalidFormat(f"qcow2 version {version} is not known", path=reader.path, offset=4)
    offset, length = reader.number(8, 8), reader.number(16, 4)
    name = ""
    if offset and length:
        if length > _MAX_NAME:
            raise InvalidFormat(f"a backing file's name of {length} bytes is too long", path=reader.path, offset=16)
        name = os.fsdecode(reader.read(offset, length).split(b"\0", 1)[0])
    has_data_file = version == 3 and bool(reader.number(72, 8) & _INCOMPATIBLE_DATA_FILE)
    if not name and not has_data_file:
        return []
    extensions = _extensions(reader, version, offset) if version > 1 else {}
    found = []
    if name:
        found.append(Link(BACKING, name, extensions.get(_EXTENSION_FORMAT) or None))
    if has_data_file:
        data_file = extensions.get(_EXTENSION_DATA_FILE)
        if not data_file:
            raise InvalidFormat("the name of the data file is not recorded", path=reader.path)
        found.append(Link(DATA_FILE, data_file, "raw", plain=True))
    return found


def _extensions(reader: Reader, version: int, end: int) -> dict[int, str]:
    """Return the texts of the extensions that matter here; what is damaged ends the walk, as what was not recorded."""
    at = _VERSION_2_LENGTH if version == 2 else reader.number(100, 4)
    if version == 3 and not _VERSION_3_MIN <= at <= _VERSION_3_MAX:
        raise InvalidFormat(f"a header of {at} bytes is impossible", path=reader.path, offset=100)
    bits = reader.number(20, 4)
    end = min(end or 1 << min(bits, _MAX_CLUSTER_BITS), reader.size)
    found: dict[int, str] = {}
    for _ in range(_MAX_EXTENSIONS):
        if at + 8 > end:
            break
        kind, length = reader.number(at, 4), reader.number(at + 4, 4)
        if not kind or at + 8 + length > end:
            break
        if kind in (_EXTENSION_FORMAT, _EXTENSION_DATA_FILE) and length <= _MAX_NAME:
            found[kind] = os.fsdecode(reader.read(at + 8, length).split(b"\0", 1)[0])
        at += 8 + (length + 7 & ~7)
    return found

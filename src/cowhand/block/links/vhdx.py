"""What a VHDX image names (Microsoft [MS-VHDX], 2.6.2.6 "Parent Locator"): a differencing disk's parent."""

from __future__ import annotations

from uuid import UUID

from cowhand.block.links.records import BACKING, Link, Reader
from cowhand.core.errors import InvalidFormat

_REGION_TABLES = (192 << 10, 256 << 10)
_MAX_ENTRIES = 2047  #: both tables: 64 KiB of entries of 32 bytes
_METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_PARENT = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_KEYS = ("relative_path", "absolute_win32_path", "volume_path")
_MAX_LOCATOR = 1 << 20


def links(reader: Reader) -> list[Link]:
    """Return what the image names. Raises InvalidFormat where that cannot be known, OSError."""
    metadata = _metadata(reader)
    if reader.read(metadata, 8) != b"metadata":
        raise InvalidFormat("the metadata region is damaged", path=reader.path, offset=metadata)
    for number in range(min(reader.number(metadata + 10, 2, little=True), _MAX_ENTRIES)):
        entry = metadata + 32 + 32 * number
        if reader.read(entry, 16) == _PARENT:
            offset, length = reader.number(entry + 16, 4, little=True), reader.number(entry + 20, 4, little=True)
            return _parent(reader, metadata + offset, length)
    return []


def _metadata(reader: Reader) -> int:
    for table in _REGION_TABLES:
        if reader.read(table, 4) != b"regi":
            continue
        for number in range(min(reader.number(table + 8, 4, little=True), _MAX_ENTRIES)):
            entry = table + 16 + 32 * number
            if reader.read(entry, 16) == _METADATA:
                return reader.number(entry + 16, 8, little=True)
    raise InvalidFormat("the region table names no metadata", path=reader.path)


def _parent(reader: Reader, at: int, length: int) -> list[Link]:
    if not 20 <= length <= _MAX_LOCATOR:
        raise InvalidFormat(f"a parent locator of {length} bytes is impossible", path=reader.path, offset=at)
    data = reader.read(at, length)
    found: dict[str, str] = {}
    for number in range(int.from_bytes(data[18:20], "little")):
        entry = data[20 + 12 * number : 32 + 12 * number]
        if len(entry) < 12:
            break
        key, value = (int.from_bytes(entry[i : i + 4], "little") for i in (0, 4))
        key_length, value_length = (int.from_bytes(entry[i : i + 2], "little") for i in (8, 10))
        text = data[key : key + key_length].decode("utf-16-le", "replace")
        found[text] = data[value : value + value_length].decode("utf-16-le", "replace")
    names = dict.fromkeys(found[key].replace("\\", "/").removeprefix("./") for key in _KEYS if found.get(key))
    if not names:
        raise InvalidFormat("the parent of the differencing disk has no name", path=reader.path, offset=at)
    return [Link(BACKING, name, "vhdx") for name in names]

"""The persistent bitmaps that a qcow2 image lists (QEMU ``docs/interop/qcow2``, "Bitmap directory"). Reading only.

A broken directory is no reason not to read the disk: then there are no bitmaps to tell of, and check says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2 import layout as L

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

IN_USE, AUTO = 1, 2
MAX_NAME = 1023  #: QEMU
MAX_DIRECTORY_BYTES = L.MAX_BITMAPS * (L.BITMAP_DIRECTORY_ENTRY.size + MAX_NAME)  #: QEMU
GRANULARITY_BITS = range(9, 32)  #: QEMU


def list_bitmaps(node: Qcow2Node) -> list[dict[str, Any]]:
    """Return {"name", "granularity", "flags"} of each persistent bitmap, as QEMU's info has them; empty where there are none that count."""
    header = node.header
    extension = header.find(L.EXT_BITMAPS)
    # Without the autoclear bit somebody wrote the image who does not know bitmaps: they are out of date.
    if extension is None or not header.autoclear & L.AUTOCLEAR_BITMAPS or len(extension) != L.BITMAP_EXTENSION.size:
        return []
    count, _, size, offset = L.BITMAP_EXTENSION.unpack(extension)
    if not 0 < size <= min(MAX_DIRECTORY_BYTES, node.file.node.size) or offset > node.file.node.size - size:
        return []
    directory = bytearray(size)
    node.file.read_into(offset, directory)
    return _parse(bytes(directory), count) or []


def _parse(directory: bytes, count: int) -> list[dict[str, Any]] | None:
    entry = L.BITMAP_DIRECTORY_ENTRY
    found: list[dict[str, Any]] = []
    at = 0
    while at + entry.size <= len(directory):
        _, _, flags, kind, bits, name_length, extra = entry.unpack_from(directory, at)
        begin = at + entry.size + extra
        at = begin + name_length + -(begin + name_length) % 8
        if at > len(directory) or kind != 1 or bits not in GRANULARITY_BITS or not 0 < name_length <= MAX_NAME:
            return None
        found.append(
            {
                "name": directory[begin : begin + name_length].decode("utf-8", "replace"),
                "granularity": 1 << bits,
                "flags": ["in-use"] * bool(flags & IN_USE) + ["auto"] * bool(flags & AUTO),
            }
        )
    return found if len(found) == count and at == len(directory) else None

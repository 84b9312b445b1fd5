"""The switch from one bitmap directory to another: the bitmaps extension in the header (QEMU ``docs/interop/qcow2``, "Bitmaps extension").

Sectors are written whole or not at all, and nothing else is relied on. Where the extension is there already and lies in one sector, its 24 bytes
are the switch. Where it comes or goes, the autoclear bit is what makes it count, and is only set while it is complete. The backing
file's name, which follows the extensions, is moved out of the way first, by a switch of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

_SECTOR = 512
_OFFSET_BACKING = 8
_HEAD = 8  #: of an extension: kind and length


def switch_directory(node: Qcow2Node, extension: bytes | None) -> None:
    """Make *extension* (None: none) the image's bitmaps extension, stably. Everything that it names is stable; everything is held.

    Raises InvalidArgument, with nothing changed, when the header has no room. After an error in between the bitmaps count for nothing.
    """
    header = node.header
    before = header.extensions, header.autoclear
    header.set(L.EXT_BITMAPS, extension)
    header.autoclear = header.autoclear & ~L.AUTOCLEAR_BITMAPS | (L.AUTOCLEAR_BITMAPS if extension is not None else 0)
    try:
        new = header.encode()
    except InvalidArgument:
        header.extensions, header.autoclear = before
        raise
    old = bytearray(node.cluster_size)
    node.file.read_into(0, old)
    try:
        _switch(node, bytes(old), new, extension)
    except BaseException as error:
        # Nobody knows which directory the file names now.
        node.set_poison(error)
        raise


def _switch(node: Qcow2Node, old: bytes, new: bytes, extension: bytes | None) -> None:
    places = _places(old)
    found = next((at for kind, at, _ in places if kind == L.EXT_BITMAPS), None)
    counted = _autoclear(old) & L.AUTOCLEAR_BITMAPS
    if found is not None and extension is not None and len(extension) == _length_at(old, found):
        at = found + _HEAD
        if counted and at // _SECTOR == (at + len(extension) - 1) // _SECTOR:
            _put(node, at, extension)
            return
        _set_autoclear(node, old, on=False)
        _put(node, at, extension)
        _set_autoclear(node, old, on=True)
        return
    _set_autoclear(node, old, on=False)
    last = places[-1][1]
    follows = [kind for kind, at, _ in places if found is not None and at > found and kind != L.EXT_END]
    if found is not None and extension is None and not follows:
        _put(node, found, bytes(_HEAD))  # the list ends here now; what lies behind is not looked at
    elif found is None and extension is not None and (last + _HEAD + len(extension) + _HEAD) <= node.cluster_size:
        _append(node, old, last, extension)
    else:
        # An extension of somebody else follows, or the room is only just enough: the header is laid out anew.
        plain = bytearray(new)
        L.U64.pack_into(plain, L.OFFSET_AUTOCLEAR, _autoclear(old) & ~L.AUTOCLEAR_BITMAPS)
        node.lay_out_header(bytes(plain))
    if extension is not None:
        _set_autoclear(node, old, on=True)


def _append(node: Qcow2Node, old: bytes, end: int, extension: bytes) -> None:
    """Add the bitmaps extension where the list ends, at *end*: first what lies behind its head, then the head."""
    stop = end + _HEAD + len(extension) + _HEAD
    name_at, name_length = L.U64.unpack_from(old, _OFFSET_BACKING)[0], L.U32.unpack_from(old, _OFFSET_BACKING + 8)[0]
    if name_at and name_at < stop:
        moved = max(stop, name_at + name_length)
        moved += -moved % 8
        if moved + name_length > node.cluster_size:
            moved = stop
        if moved < name_at + name_length or moved + name_length > node.cluster_size:
            # The old and the new place overlap, or there is no room: all of it is laid out anew.
            plain = bytearray(node.header.encode())
            L.U64.pack_into(plain, L.OFFSET_AUTOCLEAR, _autoclear(old) & ~L.AUTOCLEAR_BITMAPS)
            node.lay_out_header(bytes(plain))
            return
        _put(node, moved, old[name_at : name_at + name_length])
        _put(node, _OFFSET_BACKING, L.U64.pack(moved))
    _put(node, end + _HEAD, extension + bytes(_HEAD))
    _put(node, end, L.U32.pack(L.EXT_BITMAPS) + L.U32.pack(len(extension)))


def _places(data: bytes) -> list[tuple[int, int, int]]:
    """Return (kind, where its head is, length) of the extensions in the header's cluster, the end mark last."""
    end = L.U64.unpack_from(data, _OFFSET_BACKING)[0] or len(data)
    at = L.U32.unpack_from(data, 100)[0]
    out: list[tuple[int, int, int]] = []
    while at + _HEAD <= end:
        kind, length = L.U32.unpack_from(data, at)[0], L.U32.unpack_from(data, at + 4)[0]
        if kind == L.EXT_END:
            break
        out.append((kind, at, length))
        at += _HEAD + length + -length % 8
    return [*out, (L.EXT_END, at, 0)]


def _length_at(data: bytes, at: int) -> int:
    length: int = L.U32.unpack_from(data, at + 4)[0]
    return length


def _autoclear(data: bytes) -> int:
    bits: int = L.U64.unpack_from(data, L.OFFSET_AUTOCLEAR)[0]
    return bits


def _set_autoclear(node: Qcow2Node, old: bytes, *, on: bool) -> None:
    known = L.AUTOCLEAR_BITMAPS | L.AUTOCLEAR_RAW_DATA
    bits = _autoclear(old) & known & ~L.AUTOCLEAR_BITMAPS
    _put(node, L.OFFSET_AUTOCLEAR, L.U64.pack(bits | (L.AUTOCLEAR_BITMAPS if on else 0)))


def _put(node: Qcow2Node, offset: int, data: bytes) -> None:
    node.write_metadata(offset, data)
    node.flush_file()

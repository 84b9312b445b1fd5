"""Laying the header of a qcow2 image out anew (QEMU ``docs/interop/qcow2``, "Header", "Header extensions"), by writes inside one sector. No I/O.

Sectors are written whole or not at all, in any order until a flush. The first holds all fields; behind it lie, with the names of the features, most
of what follows in an image with clusters of more than 4 KiB: the backing file's name above all. So what changes there is written while the
first sector does without it.
"""

from __future__ import annotations

from cowhand.block.formats.qcow2.ondisk import layout as L

_SECTOR = 512
_HEAD = 8  #: of an extension: kind and length
_NAME_AT = 8

#: Writes, (offset, bytes), that are made stable together.
Stage = list[tuple[int, bytes]]


def stages(before: bytes, after: bytes) -> list[Stage]:
    """Return what brings the header's cluster from *before* to *after*: with any part of a stage done the header is the old or the new one.

    All at once, which nothing protects, where the extensions do not fit into the first sector, or the backing file's name not twice into the
    cluster.
    """
    different = [
        at for at in range(_SECTOR, len(after), _SECTOR) if before[at : at + _SECTOR] != after[at : at + _SECTOR]
    ]
    if not different:
        return [[(0, after[:_SECTOR])]]
    name_at, length = L.U64.unpack_from(after, _NAME_AT)[0], L.U32.unpack_from(after, _NAME_AT + 8)[0]
    name = after[name_at : name_at + length] if name_at else b""
    place = -(-max(_SECTOR, len(before.rstrip(b"\0")), len(after.rstrip(b"\0"))) // _SECTOR) * _SECTOR
    first = _without_names(after, place if name else 0)
    if first is None or place + len(name) > len(after):
        return [[(0, after)]]
    low, high = different[0], min(place, different[-1] + _SECTOR)
    aside: list[Stage] = [[(place, name)]] if name else []
    rest: list[Stage] = [[(0, first)], [(low, after[low:high])], [(0, after[:_SECTOR])]]
    return aside + rest + ([[(place, bytes(len(name)))]] if name else [])


def _without_names(header: bytes, name_at: int) -> bytes | None:
    """Return the first sector of *header* as one without the names of the features, and the backing file's at *name_at*; None if that is too long."""
    version = L.U32.unpack_from(header, 4)[0]
    at = L.HEADER_V2_LENGTH if version < 3 else L.U32.unpack_from(header, 100)[0]
    out = bytearray(header[:at])
    L.U64.pack_into(out, _NAME_AT, name_at)
    while True:
        kind, length = L.U32.unpack_from(header, at)[0], L.U32.unpack_from(header, at + 4)[0]
        end = at + _HEAD + length + -length % 8
        if kind != L.EXT_FEATURE_NAMES:
            out += header[at:end]
        if kind == L.EXT_END or len(out) > _SECTOR:
            return bytes(out).ljust(_SECTOR, b"\0") if len(out) <= _SECTOR else None
        at = end

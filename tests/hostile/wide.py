"""Images one of whose fields has a wide value: numbers that do not fit into 32, 63 or 64 bits, and those beside the right one.

What a field of 64 bits says may be more than the system can express as an offset, a length or an amount of memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tests.hostile import bitmaps, encryption
from tests.hostile.cases import Subject, maker
from tests.hostile.layout import FIELDS, make

#: Values of a field, as far as its width has room for them; besides: the right one and one more, one less.
WIDE = (
    1 << 31, 1 << 32, 1 << 55, 1 << 62, (1 << 63) - 512, (1 << 63) - 1, 1 << 63, (1 << 63) + 4096, (1 << 64) - 512, (1 << 64) - 1,
)  # fmt: skip


class Field(NamedTuple):
    """A number in the file: where, how many bytes, and in which order."""

    offset: int
    width: int = 8
    order: Literal["big", "little"] = "big"


Fields = dict[str, Field]


def _record(prefix: str, begin: int, names: str, widths: str, order: Literal["big", "little"] = "big") -> Fields:
    """Return the fields of a record, one behind the other; a name "-" is passed over."""
    out, at = {}, begin
    for name, width in zip(names.split(), map(int, widths.split()), strict=True):
        if name != "-":
            out[f"{prefix} {name}"] = Field(at, width, order)
        at += width
    return out


_SNAPSHOT = "l1_offset l1_size id_size name_size date_sec date_nsec clock state_size extra_size extra_state extra_disk"
_SNAPSHOT_WIDTHS = "8 4 2 2 4 4 8 4 4 8 8"
_BITMAP = "table entries flags type granularity name_size extra_size"
_BITMAP_WIDTHS = "8 4 4 1 1 2 4"


def _plain() -> tuple[bytes, Fields]:
    image = make(9)
    fields = {name: Field(*place) for name, place in FIELDS.items()}
    fields |= {name: Field(slot.offset, slot.width) for name, slot in image.slots.items()}
    fields |= _record("snapshot", image.places["snapshot table"], _SNAPSHOT, _SNAPSHOT_WIDTHS)
    fields |= {"extension kind": Field(104, 4), "extension length": Field(108, 4)}
    fields |= {f"count {number}": Field(image.places["refcount block"] + 2 * number, 2) for number in (0, 4, 12)}
    return bytes(image.data), fields


def _bitmapped() -> tuple[bytes, Fields]:
    image = make(12)
    content, table = image.take(1, "bitmap data"), image.take(1, "bitmap table")
    image.put(content, b"\x01")
    image.put_words(table, content)
    for place in (content, table):
        image.set_count(place, 1)
    bitmaps.with_bitmaps(image, bitmaps.entry(table), 1)
    directory = struct.unpack_from(">Q", image.data, 128)[0]
    fields = _record("extension", 112, "count reserved size offset", "4 4 8 8")
    fields |= _record("bitmap", directory, _BITMAP, _BITMAP_WIDTHS)
    return bytes(image.data), fields | {"bitmap table entry": Field(table)}


def _luks(kind: str) -> tuple[bytes, Fields]:
    data = encryption.sound(kind)
    begin = encryption.header_at(data, kind)
    fields = {name: Field(begin + at, width) for name, (at, width) in encryption.NUMBERS.items()}
    if kind == "qcow2":
        at = encryption.pointer_at(data)
        fields |= {"pointer offset": Field(at), "pointer length": Field(at + 8)}
    return data, fields


def _bochs() -> tuple[bytes, Fields]:
    head = struct.pack(
        "<32s16s16s5IIQ", b"Bochs Virtual HD Image", b"Redolog", b"Growing", 0x20000, 512, 4, 512, 65536, 0, 4 * 65536
    )
    data = head.ljust(512, b"\0") + struct.pack("<4I", 0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF) + b"\xff" * 512
    fields = _record("header", 64, "version size words bitmap extent reserved disk", "4 4 4 4 4 4 8", "little")
    return data.ljust(512 + 16 + 512 + 65536, b"w"), fields | {"catalog word": Field(512, 4, "little")}


KINDS: dict[str, Callable[[], tuple[bytes, Fields]]] = {
    "plain": _plain,
    "bitmaps": _bitmapped,
    "encrypted": lambda: _luks("qcow2"),
    "luks": lambda: _luks("luks"),
    "bochs": _bochs,
}


def wide_names(kind: str) -> Iterator[str]:
    """Yield the names of all images of a *kind*."""
    data, fields = KINDS[kind]()
    for name, field in fields.items():
        now = int.from_bytes(data[field.offset : field.offset + field.width], field.order)
        limit = 1 << 8 * field.width
        for value in sorted({value % limit for value in (*WIDE, now + 1, now - 1)} - {now}):
            yield f"wide/{kind}/{name}/{value:#x}"


@maker("wide")
def _make(rest: str, folder: Path) -> Subject:
    kind, name, value = rest.split("/")
    sound, fields = KINDS[kind]()
    data, field = bytearray(sound), fields[name]
    data[field.offset : field.offset + field.width] = int(value, 0).to_bytes(field.width, field.order)
    path = folder / "image"
    path.write_bytes(data)
    if kind in ("encrypted", "luks"):
        encryption.offer()
    return Subject(path, writes=kind not in ("bochs", "luks"), repairs=kind in ("plain", "bitmaps"), verbs=True)

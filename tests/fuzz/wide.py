"""Wide values for every field: an input says which image, which of its fields, and what they are to hold.

Each change is ten bytes: the number of the field (two bytes), and the value (eight, cut to its width). Then comes what other images go through.
"""

from __future__ import annotations

import struct
from functools import cache
from itertools import islice

from cowhand.block.disk import Disk
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import UNTRUSTED
from cowhand.block.protocols.memory import MemoryNode
from cowhand.drivers import REGISTRY
from tests.fuzz import exercise as images, volumes
from tests.fuzz.exercise import Steps
from tests.hostile.wide import KINDS, WIDE, Fields

_CHANGE = struct.Struct(">HQ")
#: Changes of one image.
_MOST = 4
_PIECE = 32 << 10


@cache
def _sound(kind: str) -> tuple[bytes, Fields]:
    return KINDS[kind]()


def exercise(data: bytes) -> dict[str, str]:
    """Change the fields that *data* says, and do everything with the image; return what each step answered."""
    kinds = list(KINDS)
    kind = kinds[(data[0] if data else 0) % len(kinds)]
    sound, fields = _sound(kind)
    image, places = bytearray(sound), list(fields.values())
    for at in range(1, min(len(data), _MOST * _CHANGE.size + 1) - _CHANGE.size + 1, _CHANGE.size):
        number, value = _CHANGE.unpack_from(data, at)
        place = places[number % len(places)]
        width = place.width
        image[place.offset : place.offset + width] = (value % (1 << 8 * width)).to_bytes(width, place.order)
    if kind == "luks":
        return volumes.exercise(bytes(image))
    if kind == "bochs":
        steps = Steps()
        steps.attempt("read", lambda: _read(bytes(image), kind))
        return steps.answers
    return images.exercise(bytes(image))


def _read(data: bytes, driver: str) -> None:
    """Open an image of a format that is only read, map it, and read from all over the disk."""
    root = Opening(REGISTRY, UNTRUSTED).open({"driver": driver, "file": MemoryNode(content=data), "read-only": True})
    with Disk(root) as disk:
        for batch in islice(disk.extents(), 8):
            len(batch)
        for offset in range(0, disk.size, max(_PIECE, disk.size // 16)):
            disk.read(offset, min(_PIECE, disk.size - offset))


def seeds() -> dict[str, bytes]:
    """Return an input for each value, one for each kind of image and one with several changes."""
    out = {f"value-{value:x}": bytes([0]) + _CHANGE.pack(3 * number, value) for number, value in enumerate(WIDE)}
    out |= {f"kind-{kind}": bytes([number]) for number, kind in enumerate(KINDS)}
    return out | {"several": bytes([1]) + b"".join(_CHANGE.pack(number, 1 << 63) for number in range(3))}

"""A small qcow2 image made by hand, whose every structure has a known place, for tests that then tell lies in it.

Source: QEMU ``docs/interop/qcow2``. Shares no code with the driver. The sound image has all that the format has: data in order and out of
order, both kinds of zero clusters, compressed clusters, shared and unshared tables, two snapshots, header extensions, a backing file's name.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
HOST = 0x00FFFFFFFFFFFE00

#: name → (offset, bytes) of the header's fields, in the order of the file
FIELDS = {
    "magic": (0, 4), "version": (4, 4), "backing_file_offset": (8, 8), "backing_file_size": (16, 4), "cluster_bits": (20, 4), "size": (24, 8),
    "crypt_method": (32, 4), "l1_size": (36, 4), "l1_table_offset": (40, 8), "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4), "nb_snapshots": (60, 4), "snapshots_offset": (64, 8), "incompatible_features": (72, 8),
    "compatible_features": (80, 8), "autoclear_features": (88, 8), "refcount_order": (96, 4), "header_length": (100, 4),
    "compression_type": (104, 1), "padding": (105, 7),
}  # fmt: skip


class Slot(NamedTuple):
    """A place in the image that names another: where it lies, its width in bytes, and the flags that go with an offset there."""

    offset: int
    width: int = 8
    flags: int = 0


@dataclass
class Image:
    """Bytes under construction. ``places`` are host offsets of structures, ``slots`` the pointers between them."""

    cluster_bits: int = 9
    version: int = 3
    order: int = 4
    data: bytearray = field(default_factory=bytearray)
    places: dict[str, int] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    # -- making

    def take(self, count: int = 1, name: str | None = None) -> int:
        """Return the offset of *count* new clusters at the end, called *name*."""
        offset = len(self.data)
        self.data += bytes(count * self.cluster)
        if name is not None:
            self.places[name] = offset
        return offset

    def put(self, offset: int, data: bytes) -> None:
        """Overwrite bytes; the image grows where they reach beyond its end."""
        if offset + len(data) > len(self.data):
            self.data += bytes(offset + len(data) - len(self.data))
        self.data[offset : offset + len(data)] = data

    def put_words(self, offset: int, *words: int) -> None:
        self.put(offset, struct.pack(f">{len(words)}Q", *words))

    def word(self, offset: int) -> int:
        """Return the 64-bit number at *offset*."""
        return int.from_bytes(self.data[offset : offset + 8], "big")

    def set(self, name: str, value: int) -> None:
        """Give header field *name* a value, cut to the field's width."""
        offset, width = FIELDS[name]
        self.put(offset, (value & ((1 << 8 * width) - 1)).to_bytes(width, "big"))

    def get(self, name: str) -> int:
        """Return header field *name*."""
        offset, width = FIELDS[name]
        return int.from_bytes(self.data[offset : offset + width], "big")

    def point(self, slot: str, target: int, *, flags: int | None = None) -> None:
        """Make the pointer *slot* name host offset *target*, with its usual flags or with *flags*."""
        place = self.slots[slot]
        value = target | (place.flags if flags is None else flags)
        self.put(place.offset, (value & ((1 << 8 * place.width) - 1)).to_bytes(place.width, "big"))

    def set_count(self, offset: int, count: int) -> None:
        """Set the reference count of the cluster at host *offset*, which the first refcount block has to cover."""
        bits = 1 << self.order
        number = offset >> self.cluster_bits
        block = self.places["refcount block"]
        if bits >= 8:
            self.put(block + number * bits // 8, count.to_bytes(bits // 8, "big"))
            return
        at = block + number * bits // 8
        shift = number * bits % 8
        self.data[at] = self.data[at] & ~(((1 << bits) - 1) << shift) & 0xFF | count << shift

    def copy(self) -> Image:
        """Return an image that can be spoilt without spoiling this one."""
        return Image(
            self.cluster_bits, self.version, self.order, bytearray(self.data), dict(self.places), dict(self.slots)
        )


def deflated(content: bytes) -> bytes:
    """Return *content* as a compressed cluster's payload."""
    maker = zlib.compressobj(6, zlib.DEFLATED, -12)
    return maker.compress(content) + maker.flush()


def compressed_entry(offset: int, nbytes: int, cluster_bits: int) -> int:
    """Return the L2 entry of a compressed cluster of *nbytes* at host byte *offset*."""
    shift = 62 - (cluster_bits - 8)
    sectors = (offset + nbytes - 1) // 512 - offset // 512
    return COMPRESSED | sectors << shift | offset


def extension(kind: int, data: bytes) -> bytes:
    """Return one header extension, padded."""
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def pattern(number: int, length: int) -> bytes:
    """Return *length* bytes that say which cluster they are."""
    word = b"<%06d>" % number
    return word * (length // 8)


def make(
    cluster_bits: int = 9, *, version: int = 3, order: int = 4, backing: str | None = None, tables: int = 4
) -> Image:
    """Return a sound image whose L1 table has *tables* entries, two of them used. *backing* is a raw file's name. *order* is at least 1."""
    image = Image(cluster_bits, version, order)
    size = image.cluster
    per_table = size // 8
    guest = tables * per_table * size
    image.take(1, "header")
    image.take(1, "refcount table")
    image.take(1, "refcount block")
    l1 = image.take(-(-tables * 8 // size), "L1 table")
    for number in (0, 1):
        image.take(1, f"L2 table {number}")
    image.take(1, "snapshot table")
    old = [image.take(-(-tables * 8 // size), name) for name in ("inactive L1 table", "second inactive L1 table")]
    image.take(1, "inactive L2 table")
    used = _fill(image)
    table0, table1, inactive = (image.places[name] for name in ("L2 table 0", "L2 table 1", "inactive L2 table"))
    image.put_words(l1, table0 | COPIED, table1)
    image.put_words(old[0], inactive | COPIED, table1)
    image.put_words(old[1], 0, table1)
    image.put_words(inactive, *(image.places[name] for name in ("data 0", "data 1")))
    _snapshots(image, old, tables, guest)
    _header(image, guest, tables, backing)
    image.put_words(image.places["refcount table"], image.places["refcount block"])
    for offset in range(0, len(image.data), size):
        image.set_count(offset, used.get(offset, 1))
    for name, count in (("L2 table 1", 3), ("data 4", 3), ("data 0", 2), ("data 1", 2)):
        image.set_count(image.places[name], count)
    _slots(image)
    return image


def _fill(image: Image) -> dict[int, int]:
    """Put guest data and the L2 tables that name it; return {host offset: references} of what is not referred to once."""
    size, bits = image.cluster, image.cluster_bits
    data = []
    for number in range(8):
        data.append(image.take(1, f"data {number}"))
        image.put(data[number], pattern(number, size))
    payloads = [deflated(pattern(20 + n, size)) for n in range(2)]
    packed = image.take(1, "compressed")
    image.put(packed, payloads[0] + payloads[1])
    second = packed + len(payloads[0])
    table0, table1 = image.places["L2 table 0"], image.places["L2 table 1"]
    plain_zero = ZERO if image.version >= 3 else 0
    image.put_words(
        table0, data[0], data[1], data[2] | COPIED, data[3] | COPIED, plain_zero, data[7] | COPIED | plain_zero, 0,
        compressed_entry(packed, len(payloads[0]), bits), compressed_entry(second, len(payloads[1]), bits), data[6] | COPIED, data[5] | COPIED,
    )  # fmt: skip
    image.put_words(table1 + 8, data[4])
    return {packed: 2}


def _snapshots(image: Image, l1_tables: list[int], entries: int, guest: int) -> None:
    at = image.places["snapshot table"]
    image.slots["snapshot's L1 table"] = Slot(at)
    for number, l1 in enumerate(l1_tables, 1):
        ident, name = b"%d" % number, b"night %d" % number
        entry = (
            struct.pack(">QIHHIIQII", l1, entries, len(ident), len(name), 1700000000, 0, 0, 0, 16)
            + struct.pack(">QQ", 0, guest)
            + ident
            + name
        )
        image.put(at, entry)
        at += -(-len(entry) // 8) * 8


def _header(image: Image, guest: int, l1_size: int, backing: str | None) -> None:
    places = image.places
    name = (backing or "").encode()
    body = b""
    if backing is not None:
        body += extension(0xE2792ACA, b"raw")
    body += extension(0x12345678, b"kept though unknown") + extension(0, b"")
    length = 104 if image.version >= 3 else 72
    image.put(
        0,
        struct.pack(
            ">4sIQIIQIIQQIIQ", b"QFI\xfb", image.version, length + len(body) if name else 0, len(name), image.cluster_bits, guest, 0,
            l1_size, places["L1 table"], places["refcount table"], 1, 2, places["snapshot table"],
        ),
    )  # fmt: skip
    if image.version >= 3:
        image.put(72, struct.pack(">QQQII", 0, 0, 0, image.order, length))
    image.put(length, body + name)


def _slots(image: Image) -> None:
    places = image.places
    image.slots |= {
        "header's L1 table": Slot(FIELDS["l1_table_offset"][0]),
        "header's refcount table": Slot(FIELDS["refcount_table_offset"][0]),
        "header's snapshot table": Slot(FIELDS["snapshots_offset"][0]),
        "L1 entry": Slot(places["L1 table"], flags=COPIED),
        "shared L1 entry": Slot(places["L1 table"] + 8),
        "free L1 entry": Slot(places["L1 table"] + 16, flags=COPIED),
        "L2 entry": Slot(places["L2 table 0"] + 16, flags=COPIED),
        "shared L2 entry": Slot(places["L2 table 0"]),
        "zero L2 entry": Slot(places["L2 table 0"] + 40, flags=COPIED | ZERO),
        "compressed L2 entry": Slot(places["L2 table 0"] + 56, flags=COMPRESSED),
        "refcount table entry": Slot(places["refcount table"]),
        "second refcount table entry": Slot(places["refcount table"] + 8),
        "inactive L1 entry": Slot(places["inactive L1 table"]),
        "inactive L2 entry": Slot(places["inactive L2 table"]),
    }

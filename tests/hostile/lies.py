"""Images that lie where lies have a place of their own: compressed clusters, the snapshot table, header extensions, feature bits, names."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.hostile.cases import BASE_NAME, Subject, maker, save
from tests.hostile.layout import COMPRESSED, COPIED, Image, compressed_entry, deflated, extension, make

_LOOKS = ["info", "open", "map"]

# -- compressed clusters


def _with_payload(payload: bytes, *, bits: int = 12, nbytes: int | None = None, offset: int | None = None) -> Image:
    """Return an image whose guest cluster 7 is compressed and has *payload*, or says that it lies at *offset* with *nbytes*."""
    image = make(bits)
    if offset is None:
        clusters = -(-len(payload) // image.cluster)
        offset = image.take(clusters)
        image.put(offset, payload)
        for number in range(clusters):
            image.set_count(offset + number * image.cluster, 1)
    image.put_words(image.slots["compressed L2 entry"].offset, compressed_entry(offset, nbytes or len(payload), bits))
    return image


_PIECE = bytes(1 << 20)


def _bomb(mebibytes: int) -> bytes:
    """Return deflate's form of so many MiB of zeroes."""
    maker = zlib.compressobj(9, zlib.DEFLATED, -12)
    return b"".join(maker.compress(_PIECE) for _ in range(mebibytes)) + maker.flush()


def _zstd_bomb(mebibytes: int) -> bytes:
    """Return zstd's form of so many MiB of zeroes."""
    from backports import zstd

    maker = zstd.ZstdCompressor()
    return b"".join(maker.compress(_PIECE) for _ in range(mebibytes)) + maker.flush()


def _as_zstd(image: Image) -> Image:
    """Say that the image's compressed clusters are zstd's."""
    extensions = bytes(image.data[104:368])
    image.put(104, bytes([1]) + bytes(7) + extensions)
    image.set("header_length", 112)
    image.set("incompatible_features", 8)
    return image


_COMPRESSED: dict[str, Callable[[], Image]] = {
    "a bomb of 64 MiB": lambda: _with_payload(_bomb(64), nbytes=4096),
    "a bomb in 2 MiB clusters": lambda: _with_payload(_bomb(1024), bits=21),
    "a zstd bomb": lambda: _as_zstd(_with_payload(_zstd_bomb(200), nbytes=6000)),
    "a zstd frame that wants a huge window": lambda: _as_zstd(
        _with_payload(b"\x28\xb5\x2f\xfd\x00\xff" + b"\xff" * 100)
    ),
    "zstd that is deflate": lambda: _as_zstd(_with_payload(deflated(bytes(4096)))),
    "less than a cluster": lambda: _with_payload(deflated(b"x" * 4095)),
    "nothing": lambda: _with_payload(deflated(b"")),
    "no end": lambda: _with_payload(deflated(bytes(range(256)) * 16)[:40]),
    "garbage": lambda: _with_payload(bytes(range(256)) * 4),
    "zeroes": lambda: _with_payload(bytes(512)),
    "ones": lambda: _with_payload(b"\xff" * 512),
    "beyond the end": lambda: _with_payload(b"", nbytes=100, offset=1 << 30),
    "across the end": lambda: _with_payload(b"", nbytes=4096, offset=len(make(12).data) - 100),
    "at the last possible offset": lambda: _with_payload(b"", nbytes=512, offset=(1 << 58) - 512),
    "in the header": lambda: _with_payload(b"", nbytes=512, offset=0),
    "in the L2 table that names it": lambda: _with_payload(b"", nbytes=512, offset=make(12).places["L2 table 0"]),
}


def _all_flags() -> Image:
    """Every L2 entry has all its bits set."""
    image = make()
    image.put(image.places["L2 table 0"], b"\xff" * image.cluster)
    return image


def _copied_and_compressed() -> Image:
    image = make()
    at = image.slots["compressed L2 entry"].offset
    image.put_words(at, image.word(at) | COPIED)
    return image


def _most_sectors() -> Image:
    image = make(21)
    image.put_words(
        image.slots["compressed L2 entry"].offset, COMPRESSED | ((1 << 13) - 1) << 49 | image.places["compressed"]
    )
    return image


_COMPRESSED |= {"all bits set": _all_flags, "copied": _copied_and_compressed, "of the most sectors": _most_sectors}

# -- the snapshot table


def _snapshot_field(at: int, form: str, *values: int) -> Callable[[], Image]:
    def build() -> Image:
        image = make()
        image.put(image.places["snapshot table"] + at, struct.pack(form, *values))
        return image

    return build


def _count(number: int) -> Callable[[], Image]:
    def build() -> Image:
        image = make()
        image.set("nb_snapshots", number)
        return image

    return build


def _same_ids() -> Image:
    image = make()
    table = image.places["snapshot table"]
    first = bytes(image.data[table : table + 72])
    image.put(table + 72, first)
    return image


_SNAPSHOTS: dict[str, Callable[[], Image]] = {
    "an L1 table of 4G entries": _snapshot_field(8, ">I", (1 << 32) - 1),
    "an L1 table of 4M entries": _snapshot_field(8, ">I", 4 << 20),
    "an L1 table at an odd place": _snapshot_field(0, ">Q", 0x1234),
    "an L1 table at the last offset": _snapshot_field(0, ">Q", (1 << 63) - 512),
    "no L1 table": _snapshot_field(0, ">QI", 0, 0),
    "an id that is too long": _snapshot_field(12, ">H", 0xFFFF),
    "a name that is too long": _snapshot_field(14, ">H", 0xFFFF),
    "much extra data": _snapshot_field(36, ">I", 1024),
    "too much extra data": _snapshot_field(36, ">I", 1025),
    "4 GiB of extra data": _snapshot_field(36, ">I", (1 << 32) - 1),
    "no extra data": _snapshot_field(36, ">I", 0),
    "a disk of 2^63 bytes": _snapshot_field(48, ">Q", 1 << 63),
    "a disk of 2^64 - 1 bytes": _snapshot_field(48, ">Q", (1 << 64) - 1),
    "a VM state of 2^63 bytes": _snapshot_field(40, ">Q", 1 << 63),
    "a date past the year 9999": _snapshot_field(16, ">IIQ", (1 << 32) - 1, (1 << 32) - 1, (1 << 64) - 1),
    "no text": _snapshot_field(56, ">Q", (1 << 64) - 1),
    "65,536 snapshots in zeroes": _count(65536),
    "65,537 snapshots": _count(65537),
    "the same id twice": _same_ids,
}

# -- header extensions


def _extensions(*raw: bytes, **fields: int) -> Callable[[], Image]:
    """Return a maker of images that have these header extensions in place of their own, and these header fields."""

    def build() -> Image:
        image = make(12)
        image.put(104, bytes(image.cluster - 104))
        image.put(104, b"".join(raw))
        for name, value in fields.items():
            image.set(name, value)
        return image

    return build


_BACKING_FORMAT, _FEATURES, _BITMAPS, _CRYPTO, _DATA_FILE = 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441
_END = extension(0, b"")

_EXTENSIONS: dict[str, Callable[[], Image]] = {
    "a length past the cluster": _extensions(struct.pack(">II", 0x1234, 4096)),
    "a length of 4 GiB": _extensions(struct.pack(">II", 0x1234, (1 << 32) - 1)),
    "no end mark": _extensions(*(extension(n + 1, b"x" * 8) for n in range(249))),
    "500 extensions": _extensions(*(extension(n + 1, b"") for n in range(498)), _END),
    "an end mark with a length": _extensions(struct.pack(">II", 0, (1 << 32) - 1)),
    "a backing format of 16 bytes": _extensions(extension(_BACKING_FORMAT, b"x" * 16), _END),
    "a backing format that is no text": _extensions(extension(_BACKING_FORMAT, b"\xff\x00\xfe"), _END),
    "two backing formats": _extensions(extension(_BACKING_FORMAT, b"raw"), extension(_BACKING_FORMAT, b"qcow2"), _END),
    "a feature table of odd length": _extensions(extension(_FEATURES, b"\x00\x00dirty"), _END),
    "a feature table of one name 80 times": _extensions(extension(_FEATURES, (b"\x00\x3f" + b"n" * 46) * 80), _END),
    "a bitmap directory beyond the end": _extensions(
        extension(_BITMAPS, struct.pack(">IIQQ", 1, 0, 4096, 1 << 55)), _END, autoclear_features=1
    ),
    "a bitmap directory over the header": _extensions(
        extension(_BITMAPS, struct.pack(">IIQQ", 65535, 0, 64 << 20, 0)), _END, autoclear_features=1
    ),
    "bitmaps without number": _extensions(
        extension(_BITMAPS, struct.pack(">IIQQ", 0, 0, 0, 0)), _END, autoclear_features=1
    ),
    "4G bitmaps": _extensions(
        extension(_BITMAPS, struct.pack(">IIQQ", (1 << 32) - 1, 0, (1 << 64) - 1, (1 << 64) - 512)),
        _END,
        autoclear_features=1,
    ),
    "a bitmap extension that is too short": _extensions(extension(_BITMAPS, b"\x01"), _END, autoclear_features=1),
    "a LUKS header beyond the end": _extensions(
        extension(_CRYPTO, struct.pack(">QQ", 1 << 55, 1 << 55)), _END, crypt_method=2
    ),
    "a LUKS header without encryption": _extensions(extension(_CRYPTO, struct.pack(">QQ", 4096, 1 << 40)), _END),
    "a data file's name without its bit": _extensions(extension(_DATA_FILE, b"/etc/passwd"), _END),
    "a data file": _extensions(extension(_DATA_FILE, b"/etc/passwd"), _END, incompatible_features=4),
    "a data file without a name": _extensions(_END, incompatible_features=4),
    "a name over the extensions": _extensions(
        extension(0x1234, b"y" * 64), _END, backing_file_offset=108, backing_file_size=200
    ),
}

# -- names


_NAMES = {
    "a file of the host": "/etc/passwd",
    "a file of the host by protocol": "file:/etc/passwd",
    "a file of the host by directories": "../../../../../../../etc/passwd",
    "a file of the host in json": 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    "a file of the host in json's dots": 'json:{"file.driver":"file","file.filename":"/etc/passwd"}',
    "a file of the host behind a filter": "blkdebug::/etc/passwd",
    "a configuration of the host": "blkdebug:/etc/passwd:base.raw",
    "a configuration of the host in json": 'json:{"driver":"blkdebug","config":"/etc/passwd","image":{"driver":"file","filename":"base.raw"}}',
    "a device": "/dev/zero",
    "a device by protocol": "host_device:/dev/zero",
    "a fifo": "/dev/stdin",
    "an unknown protocol": "nowhere://host/path",
    "a network host": "nbd:127.0.0.1:10809",
    "nothing but zeroes": "\0\0\0",
    "a zero in a name": "base.raw\0/etc/passwd",
    "no text": b"\xff\xfe\xfd".decode("utf-8", "surrogateescape"),
    "a folder": "/etc",
    "json that is none": "json:{",
    "json of a list": "json:[1]",
    "json of a number": "json:1",
    "json of an empty object": "json:{}",
    "json that is deep": "json:" + '{"file":' * 110,
    "json with many dots": 'json:{"' + "file." * 190 + 'filename":"base.raw"}',
    "json with many lists": 'json:{"driver":' + "[" * 400,
    "json with a driver that is no text": 'json:{"driver":{"a":1},"filename":7}',
    "json with a large number": 'json:{"driver":"null-co","size":' + "9" * 400 + "}",
    "json with a number that is none": 'json:{"driver":"raw","offset":NaN,"file":{"driver":"null-co"}}',
    "a null disk of 2^63": 'json:{"driver":"null-co","size":9223372036854775807}',
    "memory": 'json:{"driver":"memory","size":1152921504606846976}',
    "a node by its name": 'json:{"driver":"raw","file":"node0"}',
    "a raw window past the end": 'json:{"driver":"raw","offset":1000000000,"file":{"driver":"file","filename":"base.raw"}}',
    "itself": "image.qcow2",
    "itself by its folder": "./././image.qcow2",
    "itself in json": 'json:{"driver":"qcow2","file":{"driver":"file","filename":"image.qcow2"}}',
    "itself, probed in json": 'json:{"file":{"filename":"image.qcow2"}}',
}  # fmt: skip
#: What none of these names may open: whatever it is, it lies outside of the image's folder.
_OUTSIDE = ("a file of the host", "a configuration of the host", "a device", "a folder", "a network")
_ITSELF = "itself"


def _named(name: str) -> Image:
    image = make(12, backing=BASE_NAME)
    raw = name.encode("utf-8", "surrogateescape")
    # Without its format, so that it is probed where that is allowed.
    image.put(104, bytes(image.cluster - 104))
    image.put(104, _END + raw)
    image.set("backing_file_offset", 112)
    image.set("backing_file_size", len(raw))
    return image


def _feature(bit: int, name: bytes | None) -> Image:
    table = [] if name is None else [extension(_FEATURES, b"\x00" + bytes([bit]) + name.ljust(46, b"\0"))]
    return _extensions(*table, _END, incompatible_features=1 << bit)()


_KINDS: dict[str, dict[str, Callable[[], Image]]] = {
    "compressed": _COMPRESSED, "snapshots": _SNAPSHOTS, "extensions": _EXTENSIONS,
    "names": {label: partial(_named, name) for label, name in _NAMES.items()},
    "features": {
        **{f"bit {bit}": partial(_feature, bit, None) for bit in range(2, 64)},
        **{f"bit {bit} with a name": partial(_feature, bit, b"wings") for bit in (5, 20, 63)},
    },
}  # fmt: skip


def lie_names(kind: str | None = None) -> Iterator[str]:
    """Yield the names of all lying images, or of those of one *kind*."""
    for name, makers in _KINDS.items():
        if kind in (None, name):
            yield from (f"{name}/{label}" for label in makers)


def _build(kind: str) -> Callable[[str, Path], Subject]:
    def build(rest: str, folder: Path) -> Subject:
        subject = save(_KINDS[kind][rest](), folder, base=kind == "names")
        if kind == "names" and rest.startswith((*_OUTSIDE, _ITSELF)):
            subject.refused = ["open", "untrusted"]
            subject.accepted = ["info"]
        elif kind in ("names", "compressed"):
            subject.accepted = ["info"]
        elif kind == "features" and rest not in ("bit 2", "bit 3", "bit 4"):
            subject.refused = ["info", "open", "open to write"]
        return subject

    return build


for _kind in _KINDS:
    maker(_kind)(_build(_kind))

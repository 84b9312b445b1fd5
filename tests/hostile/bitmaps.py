"""Images whose persistent bitmaps lie: about sizes, granularities, names, numbers, and about what lies where."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.hostile.cases import Subject, maker, save
from tests.hostile.layout import Image, extension, make

_BITMAPS = 0x23852875
_AUTO, _IN_USE = 2, 1
_ONES = 1


def entry(
    table: int, entries: int = 1, *, flags: int = _AUTO, kind: int = 1, bits: int = 16, name: bytes = b"b", extra: bytes = b"",
    lengths: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    """Return a directory entry; *lengths* are those of name and extra data that it claims."""
    named, added = lengths or (len(name), len(extra))
    body = struct.pack(">QIIBBHI", table, entries, flags, kind, bits, named, added) + extra + name
    return body + bytes(-len(body) % 8)


def with_bitmaps(
    image: Image, directory: bytes, count: int, *, size: int | None = None, offset: int | None = None
) -> Image:
    """Give *image* a bitmap directory, and the header extension that names it (or what *size* and *offset* claim)."""
    if offset is None:
        clusters = -(-len(directory) // image.cluster) or 1
        offset = image.take(clusters)
        image.put(offset, directory)
        for number in range(clusters):
            image.set_count(offset + number * image.cluster, 1)
    image.put(104, bytes(image.cluster - 104))
    claimed = struct.pack(">IIQQ", count, 0, len(directory) if size is None else size, offset)
    image.put(104, extension(_BITMAPS, claimed) + extension(0, b""))
    image.set("autoclear_features", 1)
    return image


def _table(image: Image, *words: int) -> int:
    place = image.take()
    image.put_words(place, *words)
    image.set_count(place, 1)
    return place


def _one(words: tuple[int, ...] = (0,), **fields: object) -> Image:
    """Return an image with a bitmap whose table holds *words*."""
    image = make(12)
    place = _table(image, *words)
    return with_bitmaps(image, entry(place, **fields), 1)  # type: ignore[arg-type]


def _pointing(name: str) -> Image:
    """The bitmap's content is what lies at *name*: metadata, or somebody's data."""
    image = make(12)
    return with_bitmaps(image, entry(_table(image, image.places[name])), 1)


def _table_at(name: str) -> Image:
    """The bitmap's table is what lies at *name*."""
    image = make(12)
    return with_bitmaps(image, entry(image.places[name]), 1)


def _directory_at(name: str) -> Image:
    image = make(12)
    return with_bitmaps(image, b"", 1, size=64, offset=image.places[name])


def _uncounted() -> Image:
    """Table, content and directory lie where the reference counts say that space is free."""
    image = make(12)
    content = image.take()
    image.put(content, b"\x01")
    table = image.take()
    image.put_words(table, content)
    place = image.take()
    image.put(place, entry(table))
    return with_bitmaps(image, entry(table), 1, offset=place)


def _many(count: int, *, one_table: bool, flags: int = _AUTO) -> Image:
    """*count* bitmaps, all with one table, or none with one that is possible."""
    image = make(16)
    place = _table(image, _ONES)
    names = (str(number).encode() for number in range(count))
    directory = b"".join(entry(place if one_table else 0, flags=flags, bits=31, name=name) for name in names)
    return with_bitmaps(image, directory, count)


def _repeated(words: int) -> Image:
    """A table in which every entry names one cluster; the disk needs as many."""
    image = make(12, tables=64)
    content = image.take()
    image.put(content, b"\x55" * image.cluster)
    image.set_count(content, 1)
    place = image.take(-(-words * 8 // image.cluster))
    image.put_words(place, *(content for _ in range(words)))
    image.set_count(place, 1)
    return with_bitmaps(image, entry(place, words, bits=9), 1)


def _large(granularity: int, words: int) -> Image:
    """A disk of 2 TiB, and a bitmap as fine as that: all ones, without a cluster of its own."""
    image = make(16, tables=4096)
    place = image.take(-(-words * 8 // image.cluster))
    image.put_words(place, *(_ONES for _ in range(words)))
    image.set_count(place, 1)
    return with_bitmaps(image, entry(place, words, bits=granularity), 1)


_TABLES = ("L1 table", "L2 table 0", "refcount table", "refcount block", "data 0")
_BITMAP_LIES: dict[str, Callable[[], Image]] = {
    "sound": _one,
    "all ones": partial(_one, (_ONES,)),
    **{f"a granularity of 2^{bits}": partial(_one, bits=bits) for bits in (0, 8, 9, 31, 32, 63, 255)},
    "in use": partial(_one, flags=3),
    "flags that are reserved": partial(_one, flags=0xFFFFFFF8),
    "a type that is reserved": partial(_one, kind=0),
    "no name": partial(_one, name=b""),
    "a name that is no text": partial(_one, name=b"\xff\xfe\x00\n\x1b[31m"),
    "a name of 1,023 bytes": partial(_one, name=b"n" * 1023),
    "a name of 1,024 bytes": partial(_one, name=b"n" * 1024),
    "a name past the directory": partial(_one, lengths=(65535, 0)),
    "4 GiB of extra data": partial(_one, lengths=(1, (1 << 32) - 1)),
    "extra data": partial(_one, extra=b"x" * 16),
    "extra data that may be kept": partial(_one, extra=b"x" * 16, flags=6),
    "no table": lambda: with_bitmaps(make(12), entry(0), 1),
    "a table at an odd place": lambda: with_bitmaps(make(12), entry(0x201), 1),
    "a table at the last offset": lambda: with_bitmaps(make(12), entry((1 << 64) - 4096), 1),
    "a table beyond the end": lambda: with_bitmaps(make(12), entry(1 << 40), 1),
    "a table without entries": partial(_one, entries=0),
    "a table of 128M entries": partial(_one, entries=0x8000000),
    "a table of 4G entries": partial(_one, entries=(1 << 32) - 1),
    "a table of two entries": partial(_one, (0, 0), entries=2),
    "a cluster at an odd place": partial(_one, (0x1234 << 9,)),
    "a cluster beyond the end": partial(_one, (1 << 55,)),
    "reserved bits in the table": partial(_one, (1 << 63 | 2,)),
    "ones with a place": partial(_one, (4096 | _ONES,)),
    **{f"content in the {name}": partial(_pointing, name) for name in ("header", "snapshot table", "inactive L2 table", *_TABLES)},
    **{f"table in the {name}": partial(_table_at, name) for name in ("snapshot table", *_TABLES)},
    **{f"directory in the {name}": partial(_directory_at, name) for name in _TABLES},
    "nothing is counted": _uncounted,
    "two of one name": lambda: with_bitmaps(make(12), entry(4096) * 2, 2),
    "fewer than the header says": lambda: with_bitmaps(make(12), entry(4096), 2),
    "more than the header says": lambda: with_bitmaps(make(12), entry(4096) + entry(4096, name=b"c"), 1),
    "65,535 of one table": partial(_many, 65535, one_table=True),
    "65,535 in use": partial(_many, 65535, one_table=True, flags=3),
    "65,535 without a table": partial(_many, 65535, one_table=False),
    "65,536 bitmaps": partial(_many, 65536, one_table=True),
    "one cluster 64 times": partial(_repeated, 64),
    "the finest of 2 TiB": partial(_large, 9, 8192),
    "the coarsest of 2 TiB": partial(_large, 31, 1),
}  # fmt: skip


def bitmap_names() -> Iterator[str]:
    """Yield the names of all images whose bitmaps lie."""
    yield from (f"bitmaps/{label}" for label in _BITMAP_LIES)


@maker("bitmaps")
def _build(rest: str, folder: Path) -> Subject:
    subject = save(_BITMAP_LIES[rest](), folder)
    # Whatever is wrong with its bitmaps, the image is opened and read.
    subject.accepted = ["info", "open", "map", "read", "bitmaps", "usage"]
    return subject

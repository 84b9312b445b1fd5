"""Images that say they are large, or make much out of little: tables with millions of entries, disks of an exbibyte, refcounts that say "full"."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import Subject, maker
from tests.hostile.layout import COPIED, compressed_entry, deflated

_L1_ENTRIES = 4 << 20  # 32 MiB, the most that is allowed
_EXBIBYTE = 1 << 60


class _File:
    """A sparse file that becomes an image: only what differs from zero is written."""

    def __init__(
        self, path: Path, *, cluster_bits: int = 16, size: int, l1_size: int, table_clusters: int = 1, order: int = 4
    ) -> None:
        self.path = path
        self.cluster = 1 << cluster_bits
        self.bits = cluster_bits
        self.order = order
        self._file = path.open("w+b")
        self.table = self.cluster
        self.block = self.table + table_clusters * self.cluster
        self.l1 = self.block + self.cluster
        self.l1_size = l1_size
        self.end = self.l1 + -(-l1_size * 8 // self.cluster) * self.cluster
        self.size = size
        self.table_clusters = table_clusters
        self.words(self.table, self.block)

    def put(self, offset: int, data: bytes) -> None:
        self._file.seek(offset)
        self._file.write(data)

    def words(self, offset: int, *values: int) -> None:
        self.put(offset, struct.pack(f">{len(values)}Q", *values))

    def fill(self, offset: int, value: int, count: int) -> None:
        """Write one 64-bit number *count* times."""
        piece = struct.pack(">Q", value) * min(count, 1 << 16)
        for at in range(0, count * 8, len(piece)):
            self.put(offset + at, piece[: count * 8 - at])

    def take(self, clusters: int = 1) -> int:
        """Return the offset of new clusters."""
        offset, self.end = self.end, self.end + clusters * self.cluster
        return offset

    def finish(self, *, snapshots: tuple[int, int] = (0, 0), counted: bool = True) -> Subject:
        """Write the header and counts of 1; return the image."""
        header = struct.pack(
            ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, self.bits, self.size, 0, self.l1_size, self.l1, self.table, self.table_clusters,
            snapshots[0], snapshots[1], 0, 0, 0, self.order, 104,
        )  # fmt: skip
        self.put(0, header)
        if counted:
            width = (1 << self.order) // 8
            used = min(self.end // self.cluster, self.cluster // width)
            self.put(self.block, (1).to_bytes(width, "big") * used)
        self._file.truncate(max(self.end, self.path.stat().st_size))
        self._file.close()
        return Subject(self.path, large=True, repairs=True)


def _exabyte(path: Path) -> Subject:
    """1 EiB, all of it unallocated: an L1 table of 16 MiB of zeroes."""
    subject = _File(path, cluster_bits=21, size=_EXBIBYTE, l1_size=_EXBIBYTE >> 39).finish()
    subject.accepted = [
        "info",
        "open",
        "map",
        "read",
        "check",
        "open to write",
        "write cluster 2",
        "flush",
        "last write",
    ]
    return subject


def _exabyte_one_table(path: Path) -> Subject:
    """1 EiB, every L1 entry naming the same, empty L2 table."""
    image = _File(path, cluster_bits=21, size=_EXBIBYTE, l1_size=_EXBIBYTE >> 39)
    image.fill(image.l1, image.take(), image.l1_size)
    return image.finish()


def _too_large(path: Path) -> Subject:
    """A size that the largest L1 table cannot map."""
    subject = _File(path, size=1 << 62, l1_size=_L1_ENTRIES).finish()
    subject.refused = ["info", "open", "open to write"]
    return subject


def _one_table(flags: int, entry: Callable[[_File], int]) -> Callable[[Path], Subject]:
    def build(path: Path) -> Subject:
        image = _File(path, cluster_bits=16, size=_L1_ENTRIES << 29, l1_size=_L1_ENTRIES)
        table = image.take()
        image.fill(table, entry(image), image.cluster // 8)
        image.fill(image.l1, table | flags, image.l1_size)
        return image.finish()

    return build


def _bomb(image: _File) -> int:
    """Return the entry of a compressed cluster that is all the same byte: the smallest there is."""
    payload = deflated(bytes([65]) * image.cluster)
    offset = image.take()
    image.put(offset, payload)
    return compressed_entry(offset, len(payload), image.bits)


def _distinct_tables(path: Path) -> Subject:
    """32 MiB of L1 entries, each naming another table beyond the end of the file."""
    image = _File(path, cluster_bits=9, size=_L1_ENTRIES << 15, l1_size=_L1_ENTRIES)
    first = image.end // 512 + 1000
    for begin in range(0, image.l1_size, 1 << 16):
        image.words(
            image.l1 + begin * 8, *((n * 512) | COPIED for n in range(first + begin, first + begin + (1 << 16)))
        )
    return image.finish()


def _full_block(path: Path) -> Subject:
    """The largest refcount table, every entry naming one block that says that all clusters are in use."""
    image = _File(path, size=1 << 34, l1_size=32, table_clusters=128)
    image.fill(image.table, image.block, 128 * image.cluster // 8)
    image.put(image.block, b"\x00\x01" * (image.cluster // 2))
    return image.finish(counted=False)


def _full_blocks(path: Path) -> Subject:
    """A thousand real refcount blocks of small clusters that say "in use"."""
    image = _File(path, cluster_bits=9, size=1 << 20, l1_size=32, table_clusters=16)
    blocks = image.take(1000)
    image.words(image.table, *range(blocks, blocks + 1000 * 512, 512))
    for number in range(1000):
        image.put(blocks + number * 512, b"\x00\x01" * 256)
    return image.finish(counted=False)


def _distinct_blocks(path: Path) -> Subject:
    """The largest refcount table, its million entries naming blocks in the holes of a file of 64 GiB."""
    image = _File(path, size=1 << 34, l1_size=32, table_clusters=128)
    step = image.cluster
    for begin in range(0, 1 << 20, 1 << 16):
        image.words(
            image.table + begin * 8, *range((1 << 32) + begin * step, (1 << 32) + (begin + (1 << 16)) * step, step)
        )
    image.words(image.table, image.block)
    image.put(1 << 36, b"\x00")
    return image.finish()


def _snapshot_entries(image: _File, count: int, l1: Callable[[int], tuple[int, int]], *, name: bytes = b"n") -> Subject:
    at = table = image.end
    parts = []
    for number in range(count):
        offset, size = l1(number)
        entry = (
            struct.pack(">QIHHIIQII", offset, size, 5, len(name), 0, 0, 0, 0, 16)
            + struct.pack(">QQ", 0, image.size)
            + b"%05d" % number
            + name
        )
        parts.append(entry + bytes(-len(entry) % 8))
        at += len(parts[-1])
    image.put(table, b"".join(parts))
    image.end = -(-at // image.cluster) * image.cluster
    return image.finish(snapshots=(count, table))


def _many_snapshots(path: Path) -> Subject:
    """65,536 snapshots that all have one L1 table."""
    image = _File(path, size=1 << 34, l1_size=32)
    table = image.take()
    subject = _snapshot_entries(image, 65536, lambda _: (table, 32))
    subject.accepted = ["info", "open", "map", "read"]
    return subject


def _many_snapshot_tables(path: Path) -> Subject:
    """65,536 snapshots, each with the largest L1 table at another place, most of them beyond the end."""
    image = _File(path, size=1 << 34, l1_size=32)
    return _snapshot_entries(image, 65536, lambda n: (image.end + (n + 1000) * image.cluster, _L1_ENTRIES))


def _small_snapshot_tables(path: Path) -> Subject:
    """8,000 snapshots, each with a small L1 table of its own."""
    image = _File(path, size=1 << 34, l1_size=32)
    first = image.take(8000)
    return _snapshot_entries(image, 8000, lambda n: (first + n * image.cluster, 32))


def _long_names(path: Path) -> Subject:
    """Snapshots whose names fill the largest table, with bytes that are no text."""
    image = _File(path, size=1 << 34, l1_size=32)
    return _snapshot_entries(image, 1020, lambda _: (image.l1, 32), name=b"\xff" * 65000)


_BUILDERS: dict[str, Callable[[Path], Subject]] = {
    "exbibyte": _exabyte,
    "exbibyte in one table": _exabyte_one_table,
    "too large": _too_large,
    "4M entries name one empty table": _one_table(0, lambda image: 0),
    "4M exclusive entries name one table of one cluster": _one_table(COPIED, lambda image: image.take() | COPIED),
    "4M entries name one table of zeroes": _one_table(0, lambda image: 1),
    "4M entries name one table of itself": _one_table(COPIED, lambda image: (image.end - image.cluster) | COPIED),
    "4M entries name one table of bombs": _one_table(0, _bomb),
    "4M entries name tables beyond the end": _distinct_tables,
    "1M refcount entries name one full block": _full_block,
    "1000 full refcount blocks": _full_blocks,
    "1M refcount blocks in a hole": _distinct_blocks,
    "64K snapshots, one L1 table": _many_snapshots,
    "64K snapshots, 64K largest L1 tables": _many_snapshot_tables,
    "8000 snapshots with their own L1 tables": _small_snapshot_tables,
    "snapshots with long names": _long_names,
}


#: Those that are quickly made and treated, and differ most.
_FEW = ("exbibyte in one table", "4M exclusive entries name one table of one cluster", "1M refcount entries name one full block",
        "1000 full refcount blocks", "8000 snapshots with their own L1 tables", "snapshots with long names")  # fmt: skip


def large_names(*, few: bool = False) -> list[str]:
    """Return the names of all large images, or of *few* of them."""
    return [f"large/{name}" for name in (_FEW if few else _BUILDERS)]


@maker("large")
def _large(rest: str, folder: Path) -> Subject:
    return _BUILDERS[rest](folder / "image.qcow2")

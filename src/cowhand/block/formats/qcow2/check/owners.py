"""Who refers to which host cluster (QEMU ``docs/interop/qcow2``): every reference to some clusters in question, in words.

Damage is no obstacle: what cannot be followed is passed over, since it owns nothing. Tables are read once each, whatever names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import words_of
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Clusters that are asked for at once, owners that are told of each, and tables that are read without numpy.
MAX_CLUSTERS = 4096
MAX_OWNERS = 16
_PLAIN_TABLES = 64


class Owners:
    """Collects the owners of the clusters *wanted* (the first MAX_CLUSTERS of them). Used once, by one thread."""

    def __init__(self, node: Qcow2Node, wanted: Iterable[int]) -> None:
        self.node = node
        self.bits = node.header.cluster_bits
        self.size = 1 << self.bits
        self.found: dict[int, list[str]] = {cluster: [] for cluster in islice(wanted, MAX_CLUSTERS)}
        self._extended = bool(node.header.incompatible & L.INCOMPAT_EXTENDED_L2)
        self._external = bool(node.header.incompatible & L.INCOMPAT_DATA_FILE)
        self._tables = 0
        self._numpy: Any = None
        self._sorted: Any = None

    def collect(self) -> dict[int, list[str]]:
        """Return {cluster: what refers to it}; an empty list means that nothing does."""
        if not self.found:
            return self.found
        node, header = self.node, self.node.header
        self._region(0, self.size, "the header")
        self._region(header.l1_offset, header.l1_size * 8, "the active L1 table")
        table_bytes = header.refcount_table_clusters * self.size
        self._region(header.refcount_table_offset, table_bytes, "the refcount table")
        for index, entry in enumerate(words_of(bytes(node.refcounts.table))):
            if entry:
                self._region(entry & L.REFCOUNT_TABLE_OFFSET_MASK, self.size, f"refcount block {index}")
        self._region(header.snapshots_offset, node.snapshot_table_bytes, "the snapshot table")
        self._extensions()
        self._levels()
        return self.found

    def _region(self, offset: int, length: int, what: str) -> None:
        if length <= 0 or (not offset and what != "the header"):
            return
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if last - first > len(self.found):
            for cluster in self.found:
                if first <= cluster <= last:
                    self._add(cluster, what)
            return
        for cluster in range(first, last + 1):
            if cluster in self.found:
                self._add(cluster, what)

    def _add(self, cluster: int, what: str) -> None:
        names = self.found[cluster]
        if len(names) < MAX_OWNERS:
            names.append(what)
        elif len(names) == MAX_OWNERS:
            names.append("and more")

    def _extensions(self) -> None:
        header = self.node.header
        crypto = header.find(L.EXT_CRYPTO)
        if crypto is not None and len(crypto) >= 16:
            self._region(L.U64.unpack_from(crypto)[0], L.U64.unpack_from(crypto, 8)[0], "the encryption header")
        bitmaps = header.find(L.EXT_BITMAPS)
        if bitmaps is None or len(bitmaps) != L.BITMAP_EXTENSION.size:
            return
        count, _, size, offset = L.BITMAP_EXTENSION.unpack(bitmaps)
        self._region(offset, size, "the bitmap directory")
        try:
            for name, table, entries in _bitmaps(self.node, count, size, offset):
                self._region(table, entries * 8, f"the table of bitmap '{name}'")
                for entry in words_of(self._read(table, entries * 8)):
                    if entry & L.BITMAP_TABLE_OFFSET_MASK:
                        self._region(entry & L.BITMAP_TABLE_OFFSET_MASK, self.size, f"bitmap '{name}'")
        except CowhandError:
            return  # nothing behind the damage can be found

    def _read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        if offset < self.node.file.node.size and offset + length < 1 << 62:
            self.node.file.read_into(offset, data)
        return bytes(data)

    # -- L1 and L2

    def _levels(self) -> None:
        """Follow the L1 tables: which L2 tables there are, for whom, and what these name."""
        from cowhand.block.formats.qcow2.snapshot.table import read_l1

        node = self.node
        users: dict[int, list[tuple[str, int]]] = {}
        tables = [("the disk", bytes(node.mapping.l1.data[: node.header.l1_size * 8]))]
        for snapshot in node.snapshots[:256]:
            name = f"snapshot '{snapshot.name}'"
            self._region(snapshot.l1_offset, snapshot.l1_size * 8, f"the L1 table of {name}")
            try:
                tables.append((name, read_l1(node, snapshot)))
            except CowhandError:
                continue
        for name, l1 in tables:
            for index, entry in enumerate(words_of(l1)):
                host = entry & L.L1_OFFSET_MASK
                if host:
                    self._region(host, self.size, f"L2 table {index} of {name}")
                    rows = users.setdefault(host, [])
                    if len(rows) <= MAX_OWNERS:
                        rows.append((name, index))
        for host, rows in users.items():
            if host % self.size == 0:
                self._table(host, rows)

    def _table(self, host: int, users: list[tuple[str, int]]) -> None:
        try:
            data = self._read(host, self.size)
        except CowhandError:
            return
        self._tables += 1
        stride = 2 if self._extended else 1
        per_table = self.size // 8 // stride
        for index, entry in self._entries(data, stride):
            if entry & L.ENTRY_COMPRESSED:
                offset, length = L.compressed_location(entry, self.bits)
                kind = "compressed data"
            else:
                offset, length, kind = entry & L.L2_OFFSET_MASK, self.size, "data"
            if offset and not self._external:
                for name, number in users:
                    guest = (number * per_table + index) << self.bits
                    self._region(offset, length, f"{kind} of {name} at {guest:#x}")

    def _entries(self, data: bytes, stride: int) -> Iterator[tuple[int, int]]:
        """Yield (index, entry) of the entries that may name a cluster in question."""
        if not data.strip(b"\0"):
            return
        if self._numpy is None and self._tables > _PLAIN_TABLES:
            import numpy

            self._numpy = numpy
            self._sorted = numpy.array(sorted(self.found), dtype="u8")
        if self._numpy is None:
            words = words_of(data)
            chosen = words[::2] if stride == 2 else words
            yield from ((index, entry) for index, entry in enumerate(chosen) if entry)
            return
        numpy = self._numpy
        column = numpy.frombuffer(data, ">u8").astype("u8")[::stride]
        hosts = (column & numpy.uint64(L.L2_OFFSET_MASK)) >> numpy.uint64(self.bits)
        asked = numpy.isin(hosts, self._sorted) | (column & numpy.uint64(L.ENTRY_COMPRESSED) != 0)
        yield from ((int(index), int(column[index])) for index in numpy.flatnonzero(asked))


def _bitmaps(node: Qcow2Node, count: int, size: int, offset: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, table offset, entries) of the directory, up to the first entry that is not possible."""
    if size > 64 << 20 or count > L.MAX_BITMAPS:
        return
    data = bytearray(size)
    node.file.read_into(offset, data)
    at = 0
    while at + L.BITMAP_DIRECTORY_ENTRY.size <= size:
        table, entries, _, _, _, name, extra = L.BITMAP_DIRECTORY_ENTRY.unpack_from(data, at)
        begin = at + L.BITMAP_DIRECTORY_ENTRY.size + extra
        if begin + name > size or entries > 1 << 20:
            return
        yield bytes(data[begin : begin + name]).decode("utf-8", "replace"), table, entries
        at = -(-(begin + name) // 8) * 8


def owners(node: Qcow2Node, clusters: Iterable[int]) -> dict[int, list[str]]:
    """Return {cluster: who refers to it}, for the first MAX_CLUSTERS of *clusters*. Raises IOFailed."""
    return Owners(node, clusters).collect()

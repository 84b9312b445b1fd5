"""What the bytes of an image's file are used for (QEMU ``docs/interop/qcow2``): each cluster is of one kind, so the kinds add up to the file.

Damage is no obstacle: what cannot be followed owns nothing, and its clusters count as leaked. Each table is read once, whatever names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import words_of
from cowhand.block.formats.qcow2.refcount.counted import Tally, native
from cowhand.block.formats.qcow2.refcount.l2_scan import Scanner
from cowhand.block.formats.qcow2.snapshot.table import read_l1
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from array import array

    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: The kinds, the one that counts first where a cluster has several. "snapshots": tables and data that only snapshots need.
KINDS = ("header", "refcounts", "tables", "bitmaps", "compressed", "data", "snapshots")
#: What no table names: counted as used all the same, and not.
LEAKED, FREE = "leaked", "free"
_ORDER = 3  #: marks of one byte
_IS_SET = bytes([0]) + bytes([1]) * 255


class Usage:
    """Finds the kinds of one image's clusters. Used once, by one thread."""

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.bits = node.header.cluster_bits
        self.size = 1 << self.bits
        self.length = node.file.node.size
        self.clusters = -(-self.length // self.size)
        self._extended = bool(node.header.incompatible & L.INCOMPAT_EXTENDED_L2)
        self._external = bool(node.header.incompatible & L.INCOMPAT_DATA_FILE)
        self.marks = {kind: Tally(_ORDER, self.clusters, lambda cluster, times: None) for kind in KINDS}
        self._tables = 0

    def find(self) -> dict[str, int]:
        """Return {kind: bytes of the file}. Raises IOFailed where reference counts cannot be read."""
        node, header = self.node, self.node.header
        self._mark("header", 0, self.size)
        crypto = header.find(L.EXT_CRYPTO)
        if crypto is not None and len(crypto) >= 16:
            self._mark("header", L.U64.unpack_from(crypto)[0], L.U64.unpack_from(crypto, 8)[0])
        self._mark("refcounts", header.refcount_table_offset, header.refcount_table_clusters * self.size)
        for entry in words_of(bytes(node.refcounts.table)):
            if entry:
                self._mark("refcounts", entry & L.REFCOUNT_TABLE_OFFSET_MASK, self.size)
        self._mark("tables", header.l1_offset, header.l1_size * L.ENTRY_SIZE)
        active = self._level("tables", "data", bytes(node.mapping.l1.data[: header.l1_size * L.ENTRY_SIZE]), set())
        self._snapshots(active)
        self._bitmaps()
        return self._add_up()

    def _mark(self, kind: str, offset: int, length: int) -> None:
        if length <= 0 or offset >= self.length:
            return
        first = offset >> self.bits
        last = min((offset + length - 1) >> self.bits, self.clusters - 1)
        self.marks[kind].add(first, last - first + 1)

    # -- tables

    def _snapshots(self, known: set[int]) -> None:
        node = self.node
        self._mark("snapshots", node.header.snapshots_offset, node.snapshot_table_bytes)
        seen: set[tuple[int, int]] = set()
        for snapshot in node.snapshots:
            place = (snapshot.l1_offset, snapshot.l1_size)
            if place in seen:
                continue
            seen.add(place)
            try:
                l1 = read_l1(node, snapshot)
            except CowhandError:
                continue
            self._mark("snapshots", snapshot.l1_offset, snapshot.l1_size * L.ENTRY_SIZE)
            known |= self._level("snapshots", "snapshots", l1, known)

    def _level(self, kind: str, data_kind: str, l1: bytes, known: set[int]) -> set[int]:
        """Follow an L1 table to the L2 tables that are not *known*; return these."""
        found: set[int] = set()
        scanner = Scanner(
            self.bits, self.marks[data_kind], self.length, extended=self._extended, external=self._external
        )
        for entry in words_of(l1):
            host = entry & L.L1_OFFSET_MASK
            if not host or host in known or host in found:
                continue
            found.add(host)
            if host % self.size or host >= self.length:
                continue
            self._mark(kind, host, self.size)
            data = bytearray(self.size)
            try:
                self.node.file.read_into(host, data)
            except CowhandError:
                continue
            scan = scanner.scan(bytes(data))
            if scan is None or (scan.compressed and data_kind == "data"):
                self._look_closely(words_of(bytes(data)), data_kind, odd=scan is None)
        return found

    def _look_closely(self, words: array[int], kind: str, *, odd: bool) -> None:
        """Go through a table with compressed clusters, or with something odd, entry by entry."""
        compressed = "compressed" if kind == "data" else kind
        for entry in words[::2] if self._extended else words:
            if entry & L.ENTRY_COMPRESSED:
                if not self._external:
                    self._mark(compressed, *L.compressed_location(entry, self.bits))
            elif odd and not self._external:
                host = entry & L.L2_OFFSET_MASK
                if host and not host % self.size:
                    self._mark(kind, host, self.size)

    def _bitmaps(self) -> None:
        from cowhand.block.formats.qcow2.bitmap.data import wrong_table_entry

        directory = self.node.bitmap_directory
        if not directory.readable:
            return
        self._mark("bitmaps", directory.offset, directory.size)
        seen: set[tuple[int, int]] = set()
        for entry in directory:
            place = (entry.table, entry.entries)
            if place in seen:
                continue
            seen.add(place)
            data = bytearray(entry.entries * L.ENTRY_SIZE)
            try:
                self.node.file.read_into(entry.table, data)
            except CowhandError:
                continue
            self._mark("bitmaps", entry.table, len(data))
            for word in words_of(bytes(data)):
                if word & L.BITMAP_TABLE_OFFSET_MASK and not wrong_table_entry(word, self.size, self.length):
                    self._mark("bitmaps", word & L.BITMAP_TABLE_OFFSET_MASK, self.size)

    # -- adding up

    def _add_up(self) -> dict[str, int]:
        per_block = self.node.refcounts.per_block
        amounts = dict.fromkeys((*KINDS, LEAKED, FREE), 0)
        last = FREE  # what the file's last cluster is, which need not be there whole
        for block in self._blocks(per_block):
            first = block * per_block
            count = min(per_block, self.clusters - first)
            covered = 0
            final = 1 << 8 * (count - 1) if first + count == self.clusters else 0
            for kind in (*KINDS, LEAKED):
                piece = self.marks[kind].piece(first, count) if kind != LEAKED else self._counted(block, count)
                if piece is None:
                    continue
                new = int.from_bytes(piece.translate(_IS_SET), "little") & ~covered
                amounts[kind] += new.bit_count() * self.size
                covered |= new
                if new & final:
                    last = kind
        amounts[FREE] = self.clusters * self.size - sum(amounts.values())
        amounts[last] -= self.clusters * self.size - self.length
        return amounts

    def _blocks(self, per_block: int) -> Iterator[int]:
        limit = -(-self.clusters // per_block)
        table = words_of(bytes(self.node.refcounts.table))
        present = {index for index, entry in enumerate(table) if entry and index < limit}
        for marks in self.marks.values():
            present.update(index for index in marks.used_blocks(per_block) if index < limit)
        yield from sorted(present)

    def _counted(self, block: int, count: int) -> bytes | None:
        """Return a byte for each of *count* clusters of refcount block *block*: whether its count on disk is more than 0."""
        table = self.node.refcounts.table
        if block * L.ENTRY_SIZE + L.ENTRY_SIZE > len(table):
            return None
        host = L.U64.unpack_from(table, block * L.ENTRY_SIZE)[0] & L.REFCOUNT_TABLE_OFFSET_MASK
        if not host or host % self.size or host >= self.length:
            return None
        data = bytearray(self.size)
        self.node.file.read_into(host, data)
        order = self.node.header.refcount_order
        values = native(data, order)
        width = max(1, (1 << order) // 8)
        set_bytes = 0
        for part in range(width):
            set_bytes |= int.from_bytes(values[part : count * width : width], "little")
        return set_bytes.to_bytes(count, "little")


def usage(node: Qcow2Node) -> dict[str, int]:
    """Return {kind: bytes of the image's file}; the kinds are KINDS, LEAKED and FREE, and add up to the file's length. Raises IOFailed."""
    return Usage(node).find()

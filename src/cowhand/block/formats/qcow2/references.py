"""Everything in a qcow2 image that refers to a host cluster, counted: the tables of the disk, its snapshots and bitmaps, and all other metadata.

Source: QEMU ``docs/interop/qcow2``, "Host cluster management". A check does this too, and tells what is wrong on the way; here the image is in use,
and what is in memory and not yet in the file counts. Tables are read as columns, each of them once.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.bitmap import data as bitmapdata
from cowhand.block.formats.qcow2.cluster.encryption import header_region
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import runs_of, words_of
from cowhand.block.formats.qcow2.refcount.counted import Tally
from cowhand.block.formats.qcow2.refcount.l2_scan import Scanner
from cowhand.block.formats.qcow2.snapshot.table import read_l1
from cowhand.core.errors import CowhandError, ImageCorrupt, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Clusters behind the end of the file that are remembered because something names them.
_MOST_BEHIND = 1 << 18
#: Entries of bitmaps' tables that are followed.
_MOST_WORDS = 8 << 20
_DATA_BITS = 0xFFFFFFFF  #: of an extended entry's bitmap
#: Bytes of a file up to which all references are looked at before its first change, whatever the reference counts say.
_SMALL_FILE = 16 << 20
#: How far behind the end anybody could come to write within the life of an open image.
_REACH = 1 << 44


class References:
    """What refers to the clusters of *node*'s image now, with what is in memory and not yet in the file. The allocation lock is held.

    ``tally`` counts, without what lies behind the end of the file: ``behind`` are the clusters there that something names. ``failure`` is why some
    references could not be followed, None where all were. ``lost`` is the first byte, or None, that the file does not have although something is
    there by what the tables say: data or metadata, and not only room that was set aside.
    """

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.bits = node.header.cluster_bits
        self.size = node.cluster_size
        self._stored = node.file.node.size
        self.length = -(-self._stored // self.size) * self.size
        self.clusters = self.length >> self.bits
        self.tally = Tally(node.header.refcount_order, self.clusters, self._overflow)
        self.behind: set[int] = set()
        self.failure: CowhandError | None = None
        self.lost: int | None = None
        self.crowded: set[int] = set()  #: more refers to them than a count can tell
        self._scanner = Scanner(self.bits, self.tally, self.length, extended=node.extended, external=node.external)
        self._in_memory = {
            table.host: table.data
            for known in (node.mapping.cache.dirty, node.mapping.cache.tables)
            for table in known.values()
        }
        self._collect()

    def _overflow(self, cluster: int, _times: int) -> None:
        self.crowded.add(cluster)

    def _collect(self) -> None:
        node, header = self.node, self.node.header
        self._mark(0, self.size)
        self._mark(header.refcount_table_offset, header.refcount_table_clusters * self.size, table=True)
        for _, entry, times in runs_of(words_of(bytes(node.refcounts.table))):
            self._mark(entry & L.REFCOUNT_TABLE_OFFSET_MASK, self.size, times, table=True)
        self._mark(header.snapshots_offset, node.snapshot_table_bytes)
        if header.crypt_method == L.CRYPT_LUKS:
            self._mark(*header_region(header))
        self._levels()
        self._bitmaps()
        for freed in node.allocator.in_quarantine():
            self._mark(freed.cluster << self.bits, freed.clusters << self.bits)

    def _mark(self, offset: int, length: int, times: int = 1, *, table: bool = False) -> None:
        """Count *times* references to each cluster that ``[offset, offset + length)`` touches. A *table* is there whole or is lost."""
        if length <= 0:
            return
        if table and offset + length > self._stored:
            self._lose(max(offset, self._stored))
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        inside = min(last, self.clusters - 1)
        if first <= inside:
            self.tally.add(first, inside - first + 1, times)
        if last > inside and offset < _REACH:
            beyond = range(max(first, self.clusters), min(last, _REACH >> self.bits) + 1)
            if len(self.behind) + len(beyond) > _MOST_BEHIND:
                self._failed(ImageCorrupt("too much is named behind the end of the file", path=self.node.filename))
            else:
                self.behind.update(beyond)

    def _lose(self, offset: int) -> None:
        self.lost = offset if self.lost is None else min(self.lost, offset)

    def _failed(self, error: CowhandError) -> None:
        self.failure = self.failure or error

    # -- tables

    def _levels(self) -> None:
        node, header = self.node, self.node.header
        self._mark(header.l1_offset, header.l1_size * L.ENTRY_SIZE, table=True)
        tables: dict[int, int] = {}
        self._add_l1(bytes(node.mapping.l1.data[: header.l1_size * L.ENTRY_SIZE]), tables, 1)
        places = Counter((snapshot.l1_offset, snapshot.l1_size) for snapshot in node.snapshots)
        for snapshot in {(one.l1_offset, one.l1_size): one for one in node.snapshots}.values():
            times = places[snapshot.l1_offset, snapshot.l1_size]
            try:
                l1 = read_l1(node, snapshot)
            except CowhandError as error:
                self._failed(error)
                continue
            self._mark(snapshot.l1_offset, len(l1), times, table=True)
            self._add_l1(l1, tables, times)
        for host, times in tables.items():
            self._mark(host, self.size, times, table=host not in self._in_memory)
            if host < self.length:
                self._table(host, times)

    def _add_l1(self, l1: bytes, tables: dict[int, int], times: int) -> None:
        most = self.clusters + _MOST_BEHIND
        for _, entry, alike in runs_of(words_of(l1)):
            host = entry & L.L1_OFFSET_MASK
            if not host or len(tables) > most:
                continue
            if host % self.size:
                self._mark(host, self.size)  # nobody can follow it, and nobody is to write there
                continue
            tables[host] = tables.get(host, 0) + times * alike

    def _table(self, host: int, times: int) -> None:
        known = self._in_memory.get(host)
        if known is None:
            known = bytearray(self.size)
            try:
                self.node.file.read_into(host, known)
            except CowhandError as error:
                self._failed(error)
                return
        data = bytes(known)
        if self._scanner.scan(data, times) is None:
            self._look_closely(data, times)
        elif self._stored < self.length and not self.node.external:
            # Compressed clusters may begin in the last cluster of the file behind its end.
            for entry in words_of(data)[:: 2 if self.node.extended else 1]:
                if entry & L.ENTRY_COMPRESSED:
                    host, _ = L.compressed_location(entry, self.bits)
                    if host >= self._stored:
                        self._lose(host)

    def _look_closely(self, data: bytes, times: int) -> None:
        """Go through a table that is odd, entry by entry: what may be followed in any way counts."""
        if self.node.external:
            return
        words = words_of(data)
        stride = 2 if self.node.extended else 1
        for at in range(0, len(words), stride):
            entry = words[at]
            host = entry & L.L2_OFFSET_MASK
            if entry & L.ENTRY_COMPRESSED:
                host, nbytes = L.compressed_location(entry, self.bits)
                self._mark(host, nbytes, times)
                stored = True  # it may end earlier than its last sector, but it begins there
            elif host:
                self._mark(host, self.size, times)
                stored = bool(words[at + 1] & _DATA_BITS) if stride == 2 else not entry & L.ENTRY_ZERO
            else:
                continue
            if stored and host >= (self._stored if entry & L.ENTRY_COMPRESSED else self.length):
                self._lose(host)

    def _bitmaps(self) -> None:
        directory, node = self.node.bitmap_directory, self.node
        if not directory.present:
            return
        if directory.problems or directory.failure is not None or not directory.readable:
            self._failed(directory.failure or ImageCorrupt("the bitmap directory is broken", path=node.filename))
        if directory.readable:
            self._mark(directory.offset, directory.size)
        places = Counter((one.table, one.entries) for one in (*directory.entries, *directory.removed) if one.table)
        if sum(entries for _, entries in places) > _MOST_WORDS:
            self._failed(UnsupportedFeature("the bitmaps' tables are too large to be followed", path=node.filename))
            return
        for (offset, entries), times in places.items():
            self._mark(offset, entries * L.ENTRY_SIZE, times)
            data = bytearray(entries * L.ENTRY_SIZE)
            try:
                node.file.read_into(offset, data)
            except CowhandError as error:
                self._failed(error)
                continue
            for word in words_of(bytes(data)):
                if word > bitmapdata.ALL_ONES and word & L.BITMAP_TABLE_OFFSET_MASK:
                    self._mark(word & L.BITMAP_TABLE_OFFSET_MASK, self.size, times)

    def last(self) -> int:
        """Return the last cluster inside the file that something refers to; 0 is the header's."""
        for number in sorted(self.tally.segments, reverse=True):
            segment = self.tally.segments[number].rstrip(b"\0")
            if segment:
                return (number << self.tally.bits) + (len(segment) - 1) // self.tally.width
        return 0


def require_whole(node: Qcow2Node) -> None:
    """Raise ImageCorrupt where tables name what the file does not have: a write could lengthen it, and what was lost would read as zeroes.

    Before the first change; the allocation lock is held. Where the counts end with the file, all references of large images are not looked for.
    """
    lost, child = None, node.file
    if child.node.size <= _SMALL_FILE or node.mapping.loses_l1 or node.refcounts.verification.looks_cut():
        lost = node.references().lost
    if node.external and node.data_child is not node.file and lost is None:
        lost, child = node.mapping.first_lost(), node.data_child
    if lost is not None:
        raise ImageCorrupt(
            f"the file was cut off: it ends at {child.node.size:#x}, and the image has data or tables at {lost:#x}; it is not written, since what "
            "was lost would read as zeroes then", qemu="Input/output error", path=child.node.filename, offset=lost,
            hint="Bring the whole file back. Without it, convert --salvage copies what is left, and check tells what is missing.",
        )  # fmt: skip

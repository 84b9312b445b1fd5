"""Whether what counts as free is free: all that an image's tables refer to, held against its reference counts, once, before any of it is reused.

Source: QEMU ``docs/interop/qcow2``, "Host cluster management". One count that is too low is enough for a cluster in use to be handed out, cut off or
given back to the file system. Such counts are raised to what refers to the cluster; where that cannot be done the cluster is passed over, and where
the tables cannot be followed nothing is taken before the end of the file. Tables are read as columns, each of them once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import runs_of, words_of
from cowhand.block.formats.qcow2.refcount.counted import Tally, encoded, native
from cowhand.block.formats.qcow2.refcount.l2_scan import Scanner
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, ImageCorrupt, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Bytes of metadata up to which an image is looked at before anything at all is taken, since that costs next to nothing.
SMALL = 512 << 10
#: Clusters behind the end of the file that are remembered because something names them.
_MOST_BEHIND = 1 << 18
#: Entries of bitmaps' tables that are followed.
_MOST_WORDS = 8 << 20
#: How far behind the end anybody could come to write within the life of an open image.
_REACH = 1 << 44


class References:
    """What refers to the clusters of *node*'s image now, with what is in memory and not yet in the file. The allocation lock is held.

    ``tally`` counts, without what lies behind the end of the file: ``behind`` are the clusters there that something names. ``failure`` is why some
    references could not be followed, None where all were.
    """

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.bits = node.header.cluster_bits
        self.size = node.cluster_size
        self.length = -(-node.file.node.size // self.size) * self.size
        self.clusters = self.length >> self.bits
        self.tally = Tally(node.header.refcount_order, self.clusters, self._overflow)
        self.behind: set[int] = set()
        self.failure: CowhandError | None = None
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
        self._mark(header.refcount_table_offset, header.refcount_table_clusters * self.size)
        for _, entry, times in runs_of(words_of(bytes(node.refcounts.table))):
            self._mark(entry & L.REFCOUNT_TABLE_OFFSET_MASK, self.size, times)
        self._mark(header.snapshots_offset, node.snapshot_table_bytes)
        if header.crypt_method == L.CRYPT_LUKS:
            from cowhand.block.formats.qcow2.cluster.encryption import header_region

            self._mark(*header_region(header))
        self._levels()
        self._bitmaps()
        for freed in node.allocator.in_quarantine():
            self._mark(freed.cluster << self.bits, freed.clusters << self.bits)

    def _mark(self, offset: int, length: int, times: int = 1) -> None:
        """Count *times* references to each cluster that ``[offset, offset + length)`` touches."""
        if length <= 0:
            return
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

    def _failed(self, error: CowhandError) -> None:
        self.failure = self.failure or error

    # -- tables

    def _levels(self) -> None:
        from cowhand.block.formats.qcow2.snapshot.table import read_l1

        node, header = self.node, self.node.header
        self._mark(header.l1_offset, header.l1_size * L.ENTRY_SIZE)
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
            self._mark(snapshot.l1_offset, len(l1), times)
            self._add_l1(l1, tables, times)
        for host, times in tables.items():
            self._mark(host, self.size, times)
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

    def _look_closely(self, data: bytes, times: int) -> None:
        """Go through a table that is odd, entry by entry: what may be followed in any way counts."""
        if self.node.external:
            return
        words = words_of(data)
        for entry in words[::2] if self.node.extended else words:
            if entry & L.ENTRY_COMPRESSED:
                self._mark(*L.compressed_location(entry, self.bits), times)
            elif entry & L.L2_OFFSET_MASK:
                self._mark(entry & L.L2_OFFSET_MASK, self.size, times)

    def _bitmaps(self) -> None:
        from cowhand.block.formats.qcow2.bitmap import data as bitmapdata

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

    # -- against the counts

    def raise_counts(self) -> tuple[int, list[int]]:
        """Raise, in memory, counts that are too low; return (how many were, clusters for which that cannot be done, ascending)."""
        refcounts, tally = self.node.refcounts, self.tally
        raised, left = 0, sorted(self.crowded)
        for index in list(tally.used_blocks(refcounts.per_block)):
            first = index * refcounts.per_block
            ours = tally.piece(first, refcounts.per_block)
            if ours is None:
                continue
            try:
                block = refcounts.block(index)
            except CowhandError as error:
                self._failed(error)
                continue
            if block is None:
                left += (first + at for at in _nonzero(ours, tally))
                continue
            theirs = native(block.data, tally.order)
            low = _low(theirs, ours, tally)
            if low:
                merged = array(tally.code, theirs)
                wanted = memoryview(ours).cast(tally.code)
                for at in low:
                    merged[at] = wanted[at]
                block.data[:] = encoded(merged.tobytes(), tally.order)
                refcounts.cache.touch(block, 0, len(block.data))
                raised += len(low)
            refcounts.cache.trim()
        return raised, sorted({*left, *self.behind})

    def last(self) -> int:
        """Return the last cluster inside the file that something refers to; 0 is the header's."""
        for number in sorted(self.tally.segments, reverse=True):
            segment = self.tally.segments[number].rstrip(b"\0")
            if segment:
                return (number << self.tally.bits) + (len(segment) - 1) // self.tally.width
        return 0


def _nonzero(counts: bytes, tally: Tally) -> Iterator[int]:
    view = memoryview(counts).cast(tally.code)
    return (at for at, count in enumerate(view) if count)


def _low(theirs: bytes, ours: bytes, tally: Tally) -> list[int]:
    """Return the indices at which a count of *theirs* is lower than the one of *ours*."""
    if theirs == ours:
        return []
    if tally.numpy is not None:
        numpy = tally.numpy
        found: list[int] = numpy.flatnonzero(
            numpy.frombuffer(theirs, tally.code) < numpy.frombuffer(ours, tally.code)
        ).tolist()
        return found
    have, want = memoryview(theirs).cast(tally.code), memoryview(ours).cast(tally.code)
    if all(one >= other for one, other in set(zip(have, want, strict=True))):
        return []
    return [at for at, count in enumerate(want) if have[at] < count]


class Verification:
    """What is known of how far an image's counts can be relied on. The allocation lock is held for all of it.

    ``end`` is the first cluster that may be taken unverified: what lies behind the end of the file as it was opened nobody refers to. ``floor``:
    no cluster before it may be taken, since not all references could be followed. ``kept`` are single clusters that may not be, ascending.
    """

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.opened = -(-node.file.node.size // node.cluster_size)
        self.end = self.opened
        self.floor = 0
        self.kept: list[int] = []
        self.wrong: ImageCorrupt | None = None  #: clusters in use stay uncounted

    def prepare(self) -> None:
        """Before the first change: have small images, and files that were cut, verified whatever is taken first."""
        node = self.node
        size = len(node.metadata.clusters) * node.cluster_size
        if self.end and (size <= SMALL or self._looks_cut()):
            self.end = L.MAX_HOST_OFFSET // node.cluster_size

    def _looks_cut(self) -> bool:
        """Tell whether the image counts clusters, or names blocks of counts, that lie behind the end of the file."""
        refcounts = self.node.refcounts
        index, at = divmod(self.opened, refcounts.per_block)
        table = words_of(bytes(refcounts.table))
        if any(table[index + 1 :]):
            return True
        try:
            block = refcounts.block(index)
        except CowhandError:
            return True
        return block is not None and refcounts.counts.last_used(block.data, refcounts.per_block) >= at

    def run(self) -> References | None:
        """Hold all references against the counts, and raise those that are too low. Tells of what is wrong; raises nothing.

        Returns None where there are no counts: damage that every allocation refuses by itself.
        """
        node = self.node
        self.end = 0
        if not self._counts_header():
            return None
        found = References(node)
        raised, self.kept = found.raise_counts()
        if raised:
            node.changed = True
        inside = bisect_left(self.kept, found.clusters)
        if raised or inside:
            mended = f"{raised} of them are counted from now on" if raised else "they are left alone"
            text = f"the reference counts of {raised + inside} clusters in use are too low; {mended}"
            diagnostics.report(f"warning: '{node.filename}': {text}. Run check on the image.", as_tool=True)
        self.wrong = None
        if inside:
            at = self.kept[0] * node.cluster_size
            self.wrong = ImageCorrupt(
                f"{inside} clusters in use have no reference count that can be trusted, the first at {at:#x}", qemu="Input/output error",
                path=node.filename, offset=at, hint="Repair the image first: check --repair all.",
            )  # fmt: skip
        if found.failure is not None and not self.floor:
            self.floor = max(self.floor, self.opened)
            diagnostics.report(
                f"warning: '{node.filename}': not all that refers to clusters could be followed ({found.failure.message}), so nothing before "
                "the end of the file counts as free. Run check on the image.", as_tool=True,
            )  # fmt: skip
        return found

    def again(self) -> None:
        """Have everything verified anew before anything is taken: there are blocks now for what could not be counted."""
        if self.kept:
            self.end = L.MAX_HOST_OFFSET // self.node.cluster_size

    def _counts_header(self) -> bool:
        """Tell whether the counts know of the header. Otherwise they are none, and the first allocation refuses them by itself."""
        node = self.node
        try:
            if node.refcounts.get(0):
                return True
            error = ImageCorrupt("the reference counts call the header free", path=node.filename, offset=0)
        except CowhandError as failure:
            error = ImageCorrupt(failure.message, qemu=failure.qemu_message, path=node.filename, offset=failure.offset)
        error.hint = "Repair the image first: check --repair all."
        self.wrong = error
        return False

    def require(self) -> None:
        """Verify, if that was not done. Raises ImageCorrupt where counts are too low and could not be raised."""
        if self.end:
            self.run()
        if self.wrong is not None:
            raise self.wrong

    def behind_kept(self, first: int, count: int) -> int:
        """Return the cluster behind the last of *count* from *first* on that may not be taken; *first* where all may."""
        if first < self.floor:
            return self.floor
        at = bisect_left(self.kept, first + count)
        return self.kept[at - 1] + 1 if at and self.kept[at - 1] >= first else first

    def first_kept(self, first: int, count: int) -> int:
        """Return how many of *count* clusters from *first* on lie before the first that may not be taken."""
        if first < self.floor:
            return 0
        at = bisect_left(self.kept, first)
        return min(count, self.kept[at] - first) if at < len(self.kept) else count

    def last_kept(self, end: int) -> int:
        """Return the last cluster before *end* that must be taken for used although its count does not say so; -1 for none."""
        at = bisect_left(self.kept, end)
        return max(self.kept[at - 1] if at else -1, min(self.floor, end) - 1)

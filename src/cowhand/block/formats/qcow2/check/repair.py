"""Repairing qcow2 (QEMU ``docs/interop/qcow2``): what a check found is put right, in an order that a crash cannot make worse.

The tally of a check is the truth: what nothing refers to is free, what something refers to is not. New structures are only written where nothing is.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2 import overlap
from cowhand.block.formats.qcow2.check.references import Counters, Stopped
from cowhand.block.formats.qcow2.metadata import cluster_sets
from cowhand.block.formats.qcow2.ondisk import findings as F, layout as L
from cowhand.block.formats.qcow2.refcount.counted import encoded
from cowhand.block.node.records import NOTE, UNREADABLE, Finding
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, ImageCorrupt

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.check.check import Examination
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: QEMU's limit for a check.
_MAX_CLUSTERS = (1 << 31) - 1
#: Bytes by which a file is made longer, at most, so that a refcount block that was cut off lies inside. Farther away it is the entry that is wrong.
_MOST_CUT_OFF = 1 << 20


def _say_failed(exam: Examination, reason: str) -> None:
    """Tell that a step of the repair failed, in qemu-img's words."""
    exam.say(Finding(F.REPAIR_FAILED, UNREADABLE, reason=reason))


def _failed(exam: Examination, reason: str | None, error: CowhandError) -> Stopped:
    if reason is not None:
        _say_failed(exam, reason)
    exam.counters.check_errors += 1
    return Stopped(error)


def _conflict(exam: Examination, host: int, length: int, own: str) -> CowhandError | None:
    """Return an error when ``[host, host + length)``, about to be written as *own* kind of table, is some other metadata as well."""
    node = exam.node
    if exam.regions is None:
        exam.regions = [region for region in overlap.regions(node) if region.name != cluster_sets.INACTIVE_L2]
    for cluster in range(host // node.cluster_size, (host + length - 1) // node.cluster_size + 1):
        for region in exam.regions:
            if region.name != own and cluster in region.clusters:
                reason = f"Preventing invalid write on metadata (overlaps with {region.name})"
                exam.say(Finding(F.MARKED_CORRUPT, cluster=cluster, offset=host, owner=own, reason=reason))
                node.set_corrupt_mark()
                return ImageCorrupt(
                    f"{own} at {host:#x} overlaps with {region.name}",
                    qemu="Input/output error",
                    path=node.filename,
                    offset=host,
                )
    return None


class Uncounted:
    """The clusters that metadata occupies although nothing was counted of it, since its place or its size is not possible.

    Nobody may take them: what lies there may be all that is left of it. Ranges, since a damaged size makes millions of them.
    """

    def __init__(self, exam: Examination) -> None:
        walk = exam.walk
        self._tally = walk.tally
        self._end = walk.clusters
        ranges: list[range] = []
        others = cluster_sets.MetadataMap()
        others.include(_other_regions(overlap.regions(exam.node), ranges, self._end))
        self._single = others.clusters
        self._begins: list[int] = []
        self._ends: list[int] = []
        for known in sorted(ranges, key=lambda known: known.start):
            if self._ends and known.start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], known.stop)
            elif known:
                self._begins.append(known.start)
                self._ends.append(known.stop)

    def __contains__(self, cluster: int) -> bool:
        if cluster >= self._end or not (cluster in self._single or self._behind_range(cluster) > cluster):
            return False
        return not self._tally.get(cluster)

    def _behind_range(self, cluster: int) -> int:
        at = bisect_right(self._begins, cluster) - 1
        return max(cluster, self._ends[at]) if at >= 0 else cluster

    def among(self, clusters: Any) -> Any:
        """Return which of *clusters*, a numpy array of such that nothing was counted of, are some of these."""
        import numpy

        inside = numpy.zeros(len(clusters), bool)
        if self._begins:
            at = numpy.searchsorted(numpy.array(self._begins, "i8"), clusters, "right") - 1
            inside = (at >= 0) & (clusters < numpy.array(self._ends, "i8")[at])
        ordered = self._single.ordered if isinstance(self._single, cluster_sets.ManyClusters) else None
        if ordered is not None:
            known = numpy.frombuffer(ordered, "u8").astype("i8", copy=False)
            at = numpy.minimum(numpy.searchsorted(known, clusters), len(known) - 1)
            inside |= known[at] == clusters
        elif self._single:
            inside |= numpy.fromiter((cluster in self._single for cluster in clusters.tolist()), bool, len(clusters))
        return inside & (clusters < self._end)

    def next_outside(self, cluster: int) -> int:
        """Return the first cluster behind *cluster*, which is one of these, that need not be one of them."""
        return max(cluster + 1, min(self._behind_range(cluster), self._end))


def _other_regions(
    regions: Iterable[cluster_sets.Region], ranges: list[range], end: int
) -> Iterator[cluster_sets.Region]:
    """Yield *regions* with their clusters below *end*, but for those that are ranges: those are appended to *ranges*."""
    for region in regions:
        if isinstance(region.clusters, range):
            ranges.append(region.clusters)
        elif isinstance(region.clusters, cluster_sets.ManyClusters):
            yield region._replace(clusters=region.clusters.below(end))
        else:
            yield region


# -- entries


def zero_entry(exam: Examination, host: int, index: int, active: bool) -> bool:
    """Make entry *index* of the L2 table at *host* read as zeroes without a cluster; its cluster could not be used and held no data."""
    node = exam.node
    kind = cluster_sets.ACTIVE_L2 if active else cluster_sets.INACTIVE_L2
    if node.header.incompatible & L.INCOMPAT_EXTENDED_L2:
        at = host + index * 16
        bitmap = L.U64.unpack(exam.walk.read(at + 8, 8, F.L2_UNREADABLE))[0]
        # All that was allocated, or zero, reads as zeroes.
        data = L.U64.pack(0) + L.U64.pack((bitmap | bitmap << 32) & 0xFFFFFFFF00000000)
    else:
        at, data = host + index * 8, L.U64.pack(L.ENTRY_ZERO)
    error = _conflict(exam, at, len(data), kind)
    if error is not None:
        raise _failed(exam, "ERROR: Overlap check failed", error)
    try:
        node.write_metadata(at, data)
        node.flush_file()
    except CowhandError as failure:
        _say_failed(exam, f"ERROR: Failed to overwrite L2 table entry: {failure.qemu_message}")
        exam.counters.check_errors += 1
        return False
    return True


def flag_l1(exam: Examination, begin: int, entries: bytes | bytearray) -> None:
    """Write *entries* of the L1 table, from its byte *begin* on: some have another COPIED bit."""
    node = exam.node
    error = _conflict(exam, node.header.l1_offset + begin, len(entries), cluster_sets.ACTIVE_L1)
    if error is not None:
        raise _failed(exam, None, error)
    try:
        node.write_metadata(node.header.l1_offset + begin, entries)
    except CowhandError as failure:
        raise _failed(exam, f"ERROR: Could not write L1 table: {failure.qemu_message}", failure) from failure
    node.mapping.l1.data[begin : begin + len(entries)] = entries


def flag_l2(exam: Examination, host: int, data: bytes, changed: list[tuple[int, int]]) -> None:
    """Write the L2 table *data* at *host* with the entries *changed*: (offset inside the table, entry)."""
    error = _conflict(exam, host, len(data), cluster_sets.ACTIVE_L2)
    if error is not None:
        raise _failed(exam, "ERROR: Could not write L2 table; metadata overlap check failed: Input/output error", error)
    new = bytearray(data)
    for at, entry in changed:
        L.U64.pack_into(new, at, entry)
    try:
        exam.node.write_metadata(host, new)
    except CowhandError as failure:
        raise _failed(exam, f"ERROR: Could not write L2 table: {failure.qemu_message}", failure) from failure


# -- reference counts


def write_counts(exam: Examination, index: int, values: bytes | bytearray) -> None:
    """Write the first counts of refcount block *index*, native *values*; the block's others, behind the end of the file, stay."""
    node = exam.node
    if exam.marked:
        return
    host = L.U64.unpack_from(node.refcounts.table, index * 8)[0] & L.REFCOUNT_TABLE_OFFSET_MASK
    try:
        whole = exam.disk_block(index) or b""
        node.write_metadata(host, encoded(bytes(values) + whole[len(values) :], exam.order))
        exam.wrote_counts = True
    except CowhandError as error:
        raise _failed(exam, f"ERROR: Could not write refcount block: {error.qemu_message}", error) from error


def lengthen(exam: Examination, offset: int) -> bool:
    """Make the file so long that the refcount block at *offset* lies inside; it reads as zeroes. False when that is not possible, or far away."""
    node, walk = exam.node, exam.walk
    end = offset + walk.size
    reason = "Invalid argument" if end > L.MAX_FILE_OFFSET else "File too large"
    near = end - walk.length <= max(_MOST_CUT_OFF, 2 * walk.size)
    # QEMU: the table that counts so long a file has to keep its limit.
    most = L.MAX_REFCOUNT_TABLE_BYTES // L.ENTRY_SIZE * exam.per_block
    if near or (node.like_qemu and end // walk.size <= min(most, _MAX_CLUSTERS)):
        try:
            node.file.node.resize(end)
        except CowhandError as error:
            reason = error.qemu_message
        else:
            walk.length = max(walk.length, end)
            walk.clusters = max(walk.clusters, end // walk.size)
            return True
    _say_failed(exam, f"ERROR could not resize image: {reason}")
    return False


class _Rebuilding:
    """New refcount blocks, and a table for them, in clusters that the tally says are free. They are placed as QEMU places them."""

    def __init__(self, exam: Examination) -> None:
        self.tally = exam.walk.tally
        self.end = exam.walk.clusters
        self.per_block = exam.per_block
        self.per_table_cluster = exam.walk.size // 8
        # Where a part of the image could not be followed, what looks free may not be: then only what lies behind everything is taken.
        self.lowest = self.end if exam.walk.uncertain else 0
        self.behind = set(exam.walk.behind)
        self.uncounted = Uncounted(exam)
        self.blocks: dict[int, int] = {}
        self.table_clusters = 0

    def take(self, count: int, first: int) -> int:
        """Return the lowest run of *count* free clusters from *first* on, now counted; behind the end all is free."""
        begin = position = max(first, self.lowest)
        while position - begin < count:
            taken = position < self.end and self.tally.get(position)
            if taken:
                begin = position = self._next_free(position + 1)
            elif position in self.behind:
                begin = position = position + 1
            elif position in self.uncounted:
                begin = position = self.uncounted.next_outside(position)
            else:
                position += 1
        self.tally.add(begin, count)
        self.end = max(self.end, begin + count)
        return begin

    def _next_free(self, cluster: int) -> int:
        """Return the first cluster from *cluster* on that nothing is counted of, looking at more and more at once."""
        most = 16
        while cluster < self.end:
            step = min(most, self.end - cluster)
            piece = self.tally.piece(cluster, step)
            if piece is None:
                return cluster
            counts = memoryview(piece).cast(self.tally.code).tolist()
            if 0 in counts:
                return cluster + counts.index(0)
            cluster += step
            most = min(4096, most * 2)
        return cluster

    def place_blocks(self, low: int, high: int) -> bool:
        """Place a block for every range in ``[low, high)`` in which something is counted; tell whether the table has to be longer."""
        grown = False
        free = 0
        index = low // self.per_block
        while index * self.per_block < high:
            begin, end = max(low, index * self.per_block), min(high, (index + 1) * self.per_block)
            piece = self.tally.piece(begin, end - begin) if end > begin else None
            if piece is not None and index not in self.blocks and piece.strip(b"\0"):
                place = self.take(1, max(free, index * self.per_block))
                free = place + 1
                # The block that counts this one has to be there as well.
                high = max(high, place + 1)
                self.blocks[index] = place
                wanted = -(-(index + 1) // self.per_table_cluster)
                if wanted > self.table_clusters:
                    self.table_clusters, grown = wanted, True
            index += 1
            if piece is None:
                # Nothing was counted near it: on to where something may be.
                index = max(index, self.tally.next_known(end) // self.per_block)
        return grown

    def place(self) -> int:
        """Place everything; return the first cluster of the table."""
        self.place_blocks(0, self.end)
        while True:
            # A table that became too short leaks; the comparison that follows finds it.
            place = self.take(self.table_clusters, 0)
            if not self.place_blocks(place, place + self.table_clusters):
                return place


def rebuild_counts(exam: Examination) -> None:
    """Make a new refcount structure from the tally, switch to it, count everything anew and free what only the old one needed."""
    node, counters = exam.node, exam.counters
    exam.say(Finding(F.REBUILDING, NOTE))
    old = counters.copy()
    if exam.hidden():
        _keep_counts(exam)
    _write_structure(exam)
    counters.corruptions = counters.leaks = 0
    exam.rebuild = False
    exam.new_walk(fix=False)
    exam.calculate(fix=False)
    found = counters.copy()
    counters.assign(Counters())
    # A file that was cut is longer now, and what its tables named behind the end lies inside.
    exam.compare(leaks=not exam.hidden(), errors=True, fresh=True)
    if exam.rebuild:
        exam.say(Finding(F.STILL_BROKEN))
    fresh_leaks, unmended = counters.leaks, counters.corruptions
    counters.assign(found)
    counters.corruptions += unmended
    counters.corruptions_fixed += max(0, old.corruptions - counters.corruptions)
    kept = fresh_leaks if exam.hidden() else 0
    counters.leaks_fixed += max(0, old.leaks - counters.leaks - kept)
    counters.leaks += fresh_leaks
    node.refcounts.cache.clear()


def _keep_counts(exam: Examination) -> None:
    """Let no count of the tally be lower than the image's own: something that could not be followed may be what the others refer to."""
    walk, per_block = exam.walk, exam.per_block
    tally = walk.tally
    exam.say(Finding(F.LEAKS_KEPT, NOTE, what=exam.hidden()))
    for index in range(min(-(-walk.clusters // per_block), len(exam.node.refcounts.table) // 8)):
        try:
            block = exam.disk_block(index)
        except CowhandError:
            continue
        if block is None:
            continue
        first = index * per_block
        theirs = block[: min(per_block, walk.clusters - first) * tally.width]
        ours = tally.piece(first, len(theirs) // tally.width) or bytes(len(theirs))
        if theirs != ours:
            pairs = zip(memoryview(theirs).cast(tally.code), memoryview(ours).cast(tally.code), strict=True)
            counts = [min(max(pair), tally.maximum) for pair in pairs]
            tally.replace(first, array(tally.code, counts).tobytes())


def _write_structure(exam: Examination) -> None:
    node = exam.node
    size = node.cluster_size
    if exam.walk.behind_many:
        error = ImageCorrupt(
            "too much is referred to behind the end of the file to find free space",
            qemu="File too large",
            path=node.filename,
        )
        raise _failed(exam, "ERROR allocating refblock: File too large", error)
    new = _Rebuilding(exam)
    place = new.place()
    table = bytearray(new.table_clusters * size)
    try:
        for index, cluster in new.blocks.items():
            L.U64.pack_into(table, index * 8, cluster * size)
            counts = new.tally.piece(index * new.per_block, new.per_block)
            assert counts is not None
            node.write_metadata(cluster * size, encoded(counts, exam.order))
        node.write_metadata(place * size, table)
        node.flush_file()
        node.switch_header(refcount_table_offset=place * size, refcount_table_clusters=new.table_clusters)
    except CowhandError as error:
        raise _failed(exam, f"ERROR writing the new refcount structure: {error.qemu_message}", error) from error
    node.refcounts.table = table
    node.refcounts.cache.clear()
    exam.regions = None


# -- snapshots and marks


def cut_snapshots(node: Qcow2Node, count: int) -> None:
    """Leave the table's first *count* snapshots; what the others held is leaked, and freed by what follows."""
    node.switch_header(snapshot_count=count)


def rewrite_snapshots(exam: Examination, counters: Counters) -> None:
    """Write the snapshot table anew, its entries complete and their extra data cut."""
    from cowhand.block.formats.qcow2.snapshot.operations import store_table

    node = exam.node
    node.flush_file()
    forget(node)
    node.rebuild_metadata_map()
    try:
        store_table(node, node.snapshots)
    except CowhandError as error:
        counters.check_errors += 1
        _say_failed(exam, f"ERROR failed to update snapshot table: {error.qemu_message}")
        raise Stopped(error) from error
    counters.corruptions_fixed += counters.corruptions
    counters.corruptions = 0


def mark_sound(node: Qcow2Node) -> None:
    """Take the dirty and the corrupt mark from an image that a repair found sound, once all that it did is stable."""
    node.flush_file()
    # An open image whose counts are postponed goes on as before.
    marks = L.INCOMPAT_CORRUPT | (0 if node.lazy else L.INCOMPAT_DIRTY)
    if node.header.version >= 3 and node.header.incompatible & marks:
        node.set_incompatible(node.header.incompatible & ~marks)


def forget(node: Qcow2Node) -> None:
    """Forget what is in memory of tables that a repair may have changed on disk."""
    node.refcounts.cache.clear()
    node.refcounts.free_index = 0
    node.mapping.cache.clear()
    node.allocator.next_byte = 0
    if node.in_use_for_writing:
        node.rebuild_metadata_map()


def repair_dirty(node: Qcow2Node) -> None:
    """Put right the counts of an image that was not closed, with lazy reference counts, before it is written. Raises ImageCorrupt."""
    from cowhand.block.formats.qcow2.check.check import check

    def report(finding: Finding) -> None:
        for line in finding.text.split("\n"):
            diagnostics.report(line)

    result = check(node, "all", report, spare_bitmaps=True)
    if result.failure is not None or result.check_errors or result.corruptions:
        raise ImageCorrupt(
            "the image was not closed properly, and its reference counts cannot be repaired", qemu="Could not repair dirty image: Input/output error",
            path=node.filename, hint="Look at it with check.",
        )  # fmt: skip

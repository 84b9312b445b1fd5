"""Changing the width of qcow2's reference counts in place (QEMU ``docs/interop/qcow2``, "Host cluster management").

New blocks and a new table are made beside the old ones, which count them too. When they are stable, one write inside the header's first sector
names them and their width; after it the old ones are freed. A crash before or after it leaks the one or the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount.counted import encoded, native
from cowhand.block.formats.qcow2.refcount.refcounts import Refcounts
from cowhand.core.errors import CowhandError, InvalidArgument, NoSpace

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

_CODES: dict[int, Literal["B", "H", "I", "Q"]] = {0: "B", 1: "B", 2: "B", 3: "B", 4: "H", 5: "I", 6: "Q"}
#: Bytes of blocks that are written before the next are made.
_PIECE = 4 << 20


def change_width(node: Qcow2Node, order: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Make the reference counts of *node*, which nothing else uses, ``2**order`` bits wide.

    *progress* is called with (done, all) of what is known to be done; as in QEMU it may fall back. Raises InvalidArgument for a count that
    does not fit, before anything is changed, NoSpace, ImageCorrupt, IOFailed: the old counts are in force then.
    """
    node.flush()
    node.release_quarantine(everything=True)
    with node.exclusive():
        node.write_back.run(locked=True)
        change = _Change(node, order, progress)
        try:
            change.make()
            change.switch()
        except BaseException:
            change.undo()
            raise
        change.free_old()


class _Change:
    """One change of the width. The locks are held."""

    def __init__(self, node: Qcow2Node, order: int, progress: Callable[[int, int], None] | None) -> None:
        self.node = node
        self.order = order
        self.old = node.refcounts
        self.per_block = node.cluster_size * 8 >> order
        self.places: dict[int, int] = {}  #: clusters of the new blocks, by their index
        self.table_first = self.table_clusters = 0
        self.walks = 0
        self._progress = progress
        self.switched = False

    def make(self) -> None:
        """Take space for blocks and table until they count themselves, then write them."""
        self._refuse_high()
        grown = True
        while grown:
            grown = self._take_blocks()
            self.walks += 1
            grown = self._take_table() or grown
        self.node.write_back.flush_refcounts()
        self._write_blocks()
        self.node.write_metadata(self.table_first * self.node.cluster_size, self._table())
        self.node.flush_file()

    def _tell(self, done: int, whole: int) -> None:
        if self._progress is not None and whole:
            self._progress(self.walks * whole + done, max(self.walks + 2, 3) * whole)

    def _refuse_high(self) -> None:
        limit = (1 << 63) - 1 if self.order == 6 else (1 << (1 << self.order)) - 1
        if self.old.counts.maximum <= limit:
            return
        code = _CODES[self.old.counts.order]
        for index in self._old_blocks():
            block = self.old.block(index)
            assert block is not None
            values = memoryview(native(block.data, self.old.counts.order)).cast(code)
            highest = max(values)
            if highest > limit:
                cluster = index * self.old.per_block + values.tolist().index(highest)
                offset = cluster * self.node.cluster_size
                raise InvalidArgument(
                    f"Cannot decrease refcount entry width to {1 << self.order} bits: Cluster at offset {offset:#x} has a refcount of {highest}",
                    path=self.node.filename, offset=offset,
                )  # fmt: skip
            self.old.cache.trim()

    def _old_blocks(self) -> Iterator[int]:
        """Yield the indices of the blocks that exist."""
        for index in range(len(self.old.table) // 8):
            if self.old.block_offset(index):
                yield index

    def _needed(self, index: int) -> Iterator[int]:
        """Yield the indices of the new blocks that have to count something that old block *index* counts."""
        old = self.old
        block = old.block(index)
        assert block is not None
        first, end = index * old.per_block, (index + 1) * old.per_block
        while first < end:
            number = first // self.per_block
            stop = min(end, (number + 1) * self.per_block)
            begin, behind = old.counts.span(first - index * old.per_block, stop - first)
            if number not in self.places and bytes(block.data[begin:behind]).strip(b"\0"):
                yield number
            first = stop

    def _take_blocks(self) -> bool:
        """Take a cluster for each new block that is still missing; tell whether there was one."""
        grown = False
        whole = len(self.old.table) // 8
        # Taking a cluster may add a block: the table is looked at as it is then.
        for index in range(whole):
            self._tell(index, whole)
            if self.old.block_offset(index):
                for number in self._needed(index):
                    self.places[number] = self.node.allocator.take(1)
                    grown = True
                self.old.cache.trim()
        self._tell(whole, whole)
        return grown or len(self.old.table) // 8 > whole

    def _take_table(self) -> bool:
        """Take adjoining clusters for the table; tell whether that was needed."""
        clusters = -(-(max(self.places, default=0) + 1) * 8 // self.node.cluster_size)
        if clusters == self.table_clusters:
            return False
        if clusters * self.node.cluster_size > L.MAX_REFCOUNT_TABLE_BYTES:
            raise NoSpace("the refcount table would be larger than 8 MiB", path=self.node.filename, errno=27)
        if self.table_clusters:
            self.node.allocator.untake(self.table_first, self.table_clusters)
            self.table_clusters = 0
        self.table_first = self.node.allocator.take(clusters)
        self.table_clusters = clusters
        return True

    def _write_blocks(self) -> None:
        written = 0
        for number in sorted(self.places):
            self._tell(number, max(self.places) + 1)
            data = encoded(self._values(number), self.order)
            self.node.write_metadata(self.places[number] * self.node.cluster_size, data)
            written += len(data)
            if written >= _PIECE:
                self.old.cache.trim()
                written = 0
        self._tell(1, 1)

    def _values(self, number: int) -> bytes:
        """Return the counts of new block *number* as native values."""
        old, order = self.old, self.old.counts.order
        code = _CODES[self.order]
        out = array(code, bytes(self.per_block * array(code).itemsize))
        first, end = number * self.per_block, (number + 1) * self.per_block
        position = first
        while position < end:
            index, at = divmod(position, old.per_block)
            stop = min(end, (index + 1) * old.per_block)
            block = old.block(index)
            if block is not None:
                begin, behind = old.counts.span(at, stop - position)
                values = memoryview(native(block.data[begin:behind], order)).cast(_CODES[order])
                out[position - first : stop - first] = array(code, values.tolist())
            position = stop
        return out.tobytes()

    def _table(self) -> bytearray:
        size = self.node.cluster_size
        table = bytearray(self.table_clusters * size)
        for number, cluster in self.places.items():
            L.U64.pack_into(table, number * 8, cluster * size)
        return table

    def switch(self) -> None:
        """Have the header name the new counts."""
        node, header = self.node, self.node.header
        self._old_table = header.refcount_table_offset // node.cluster_size, header.refcount_table_clusters
        node.switch_header(
            refcount_table_offset=self.table_first * node.cluster_size,
            refcount_table_clusters=self.table_clusters,
            refcount_order=self.order,
        )
        self.switched = True
        counts = Refcounts(node, self._table())
        counts.cache.limit = self.old.cache.limit
        node.refcounts = node.allocator.refcounts = counts
        node.rebuild_metadata_map()

    def undo(self) -> None:
        """Give back what was taken, as far as that can be done."""
        if self.switched or self.node.poison is not None:
            return
        for cluster in self.places.values():
            self.node.allocator.untake(cluster, 1)
        if self.table_clusters:
            self.node.allocator.untake(self.table_first, self.table_clusters)
        self.node.changed = True

    def free_old(self) -> None:
        """Count down what only the old counts needed. An error costs space only."""
        node = self.node
        first, count = self._old_table
        for index in range(len(self.old.table) // 8):
            try:
                offset = self.old.block_offset(index)
            except CowhandError:
                continue
            if offset:
                node.allocator.untake(offset // node.cluster_size, 1)
        if count:
            node.allocator.untake(first, count)
        self.old.cache.clear()
        node.changed = True
        node.write_back.flush_refcounts()

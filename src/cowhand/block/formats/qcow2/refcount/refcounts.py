"""Reference counts of qcow2 (QEMU ``docs/interop/qcow2``, "Host cluster management"): a table of blocks of counts, 1 to 64 bits wide.

All methods need the node's allocation lock. Where a new block is placed, and how the table grows, follows QEMU, whose tests know the offsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.format_io.table_cache import Table, TableCache
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.refcount_entries import Counts
from cowhand.block.formats.qcow2.refcount.verification import Verification
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, ImageCorrupt, InvalidFormat, NoSpace

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Bytes of refcount blocks kept in memory: at 64 KiB clusters and 16 bits this covers 512 GiB.
CACHE_LIMIT = 16 << 20


class MissingBlock(Exception):
    """There is no refcount block for ``cluster``; it has to be made first."""

    def __init__(self, cluster: int) -> None:
        super().__init__()
        self.cluster = cluster


class Refcounts:
    """The reference counts of one image. Cluster numbers are host offsets divided by the cluster size."""

    def __init__(self, node: Qcow2Node, table: bytearray) -> None:
        self.node = node
        self.table = table
        self.counts = Counts(node.header.refcount_order)
        self.cluster_size = node.cluster_size
        self.per_block = node.cluster_size * 8 >> node.header.refcount_order
        self.cache = TableCache(CACHE_LIMIT)
        self.verification = Verification(node)
        self.free_index = 0  #: no cluster below is free: where the search for space begins

    # -- looking

    def block_offset(self, index: int) -> int:
        """Return the host offset of block *index*, or 0 when there is none. Raises ImageCorrupt for an impossible one."""
        at = index * 8
        if at + 8 > len(self.table):
            return 0
        entry: int = L.U64.unpack_from(self.table, at)[0]
        offset = entry & L.REFCOUNT_TABLE_OFFSET_MASK
        if offset and offset % self.cluster_size:
            text = f"Refblock offset {offset:#x} unaligned (reftable index: {L.c_hex(index)})"
            raise self.node.mark_corrupt(text, offset=self.node.header.refcount_table_offset + at)
        if offset > L.MAX_FILE_OFFSET - self.cluster_size:
            raise self._impossible(index, offset, "where no file reaches")
        return offset

    def _impossible(self, index: int, offset: int, where: str) -> ImageCorrupt:
        return ImageCorrupt(
            f"refcount block {index} lies at {offset:#x}, {where}", qemu="Input/output error", path=self.node.filename,
            offset=self.node.header.refcount_table_offset + index * L.ENTRY_SIZE, hint="Repair the image: check --repair all.",
        )  # fmt: skip

    def block(self, index: int) -> Table | None:
        """Return block *index*, read when it is not cached, or None where none exists."""
        found = self.cache.tables.get(index)
        if found is not None:
            return found
        offset = self.block_offset(index)
        if not offset:
            return None
        behind = offset >= self.node.file.node.size
        if behind and self.node.header.refcount_table_offset:
            # Read as zeroes it would call everything free, and written it would make the file so long.
            raise self._impossible(index, offset, "behind the end of the file")
        data = bytearray(self.cluster_size)
        if not behind:  # a table in the header names no blocks, and finds cluster 0 free: that is refused
            self.node.file.read_into(offset, data)
        table = Table(data, offset)
        # Not trimmed here: a caller may hold other blocks that it is about to change.
        self.cache.put(index, table)
        return table

    def get(self, cluster: int) -> int:
        """Return the count of *cluster*."""
        index, at = divmod(cluster, self.per_block)
        block = self.block(index)
        return self.counts.get(block.data, at) if block is not None else 0

    def get_or_none(self, cluster: int) -> int | None:
        """Return the count of *cluster*, or None where no block counts it."""
        block = self.block(cluster // self.per_block)
        return None if block is None else self.counts.get(block.data, cluster % self.per_block)

    def find_free(self, first: int, count: int) -> int:
        """Return the lowest cluster from *first* on with which *count* free ones begin. Raises NoSpace past the format's limit.

        What lay in the file when it was opened is only called free once all tables were asked.
        """
        known = self.verification
        begin = self._search(max(first, known.floor), count)
        if begin < known.end:
            known.run()
            begin = self._search(max(first, known.floor), count)
        if known.kept:
            while (behind := known.behind_kept(begin, count)) != begin:
                begin = self._search(behind, count)
        return begin

    def _search(self, first: int, count: int) -> int:
        limit = L.MAX_HOST_OFFSET // self.cluster_size
        begin, have = first, 0
        while have < count:
            if begin + count > limit:
                raise NoSpace("the image has no free host offsets left", path=self.node.filename, errno=27)
            index, at = divmod(begin + have, self.per_block)
            block = self.block(index)
            if block is None:
                have += self.per_block - at
                continue
            run = self.counts.zero_run(block.data, at, min(count - have, self.per_block - at))
            have += run
            if have < count and at + run < self.per_block:
                # Something is in use here: begin anew behind it.
                following = self.counts.next_zero(block.data, at + run, self.per_block)
                begin, have = index * self.per_block + following, 0
        return begin

    def free_run(self, first: int, count: int) -> int:
        """Return how many of *count* clusters from *first* on are free before the first other."""
        known = self.verification
        have = self._zeroes(first, count)
        if have and first < known.end:
            known.run()
            have = self._zeroes(first, count)
        return known.first_kept(first, have) if known.kept or known.floor else have

    def _zeroes(self, first: int, count: int) -> int:
        have = 0
        limit = min(count, L.MAX_HOST_OFFSET // self.cluster_size - first)
        while have < limit:
            index, at = divmod(first + have, self.per_block)
            block = self.block(index)
            step = min(limit - have, self.per_block - at)
            run = self.counts.zero_run(block.data, at, step) if block is not None else step
            have += run
            if run < step:
                break
        return have

    def last_used(self, end: int) -> int:
        """Return the last cluster before *end* that is in use; 0, the header's, where none is. Raises ImageCorrupt where that cannot be known."""
        self.verification.require()
        kept = self.verification.last_kept(end)
        while end > 0:
            index = (end - 1) // self.per_block
            block = self.block(index)
            self.cache.trim()
            found = self.counts.last_used(block.data, end - index * self.per_block) if block is not None else -1
            if found >= 0:
                return max(kept, index * self.per_block + found)
            # Where the table names no block nothing is looked at one by one.
            end = index * self.per_block if block is not None else self._named_before(index) * self.per_block
        return max(kept, 0)

    def _named_before(self, index: int) -> int:
        """Return the end of the last block before *index* that the table names."""
        return len(self.table[: index * 8].rstrip(b"\0")) + 7 >> 3

    # -- changing

    def change(self, cluster: int, count: int, delta: int) -> None:
        """Add *delta* to the counts of *count* clusters; all or none.

        Raises MissingBlock when counts rise where no block is, ImageCorrupt when one would fall below zero, InvalidFormat on overflow.
        """
        if delta < 0 and self.node.poison is None:
            self._check_table()
        parts = []
        position, left = cluster, count
        while left:
            index, at = divmod(position, self.per_block)
            step = min(left, self.per_block - at)
            self.node.fire("refblock_alloc")
            block = self.cache.tables.get(index)
            if block is None and not self.block_offset(index):
                if delta > 0:
                    raise MissingBlock(position)
                raise ImageCorrupt(f"cluster {position} has no reference count to take away", path=self.node.filename)
            self.node.fire("refblock_load")
            block = block or self.block(index)
            assert block is not None
            parts.append((block, at, step, self._new_values(block, at, step, delta, position)))
            position += step
            left -= step
        for block, at, step, values in parts:
            if isinstance(values, int):
                start, end = self.counts.fill(block.data, at, step, values)
            else:
                start, end = self.counts.store(block.data, at, values)
            self.cache.touch(block, start, end)
        if delta < 0:
            self.free_index = min(self.free_index, cluster)
            self.node.allocator.close_room(cluster, count)

    def _check_table(self) -> None:
        """Raise ImageCorrupt when the header itself serves as the table: its bytes name no blocks that may be written."""
        if not self.node.header.refcount_table_offset and self.table:
            raise self.node.mark_corrupt("Preventing invalid write on metadata (overlaps with qcow2_header)", offset=0)

    def _new_values(self, block: Table, at: int, step: int, delta: int, cluster: int) -> int | list[int]:
        same = self.counts.uniform(block.data, at, step)
        if same is not None:
            self._check(same + delta, cluster)
            return same + delta
        values = [self.counts.get(block.data, at + i) + delta for i in range(step)]
        for i, value in enumerate(values):
            self._check(value, cluster + i)
        return values

    def _check(self, value: int, cluster: int) -> None:
        if value < 0:
            raise ImageCorrupt(
                f"the reference count of cluster {cluster} would fall below zero", qemu="Invalid argument", path=self.node.filename,
                offset=cluster * self.cluster_size, hint="Run check.",
            )  # fmt: skip
        if value > self.counts.maximum:
            raise InvalidFormat(
                f"the reference count of cluster {cluster} would be {value}, more than {self.counts.maximum}, which its width allows",
                qemu="Invalid argument", path=self.node.filename, offset=cluster * self.cluster_size,
            )  # fmt: skip

    # -- growing: with the write-back lock as well, since metadata is written at once

    def add_block(self, cluster: int) -> None:
        """Make the block that counts *cluster*. What was found free before may be in use afterwards: search again."""
        node = self.node
        index = cluster // self.per_block
        if self.block_offset(index):
            return
        place = self.find_free(self.free_index, 1)
        self.free_index = place + 1
        if place // self.per_block != index and not self.block_offset(place // self.per_block):
            # As in QEMU the block that counts this place comes behind it, and the place is looked at again.
            try:
                self.add_block(place)
            finally:
                self.free_index = min(self.free_index, place)
            return
        offset = place * self.cluster_size
        if not offset:
            raise node.mark_corrupt("Preventing invalid allocation of refcount block at offset 0", offset=0)
        self._check_table()
        node.check_overlap(offset, self.cluster_size)
        block = Table(bytearray(self.cluster_size), offset)
        own = place // self.per_block == index
        if own:
            self.counts.fill(block.data, place % self.per_block, 1, 1)
        else:
            self.change(place, 1, 1)
        try:
            # What describes the block must be stable before the table names it, and so must the block.
            node.write_back.flush_refcounts()
            node.fire("refblock_alloc_write")
            node.write_metadata(offset, block.data)
            node.flush_file()
            if index * 8 < len(self.table):
                node.fire("refblock_alloc_hookup")
                entry = L.U64.pack(offset)
                at = node.header.refcount_table_offset + index * 8
                with node.publishing(at, bytes(self.table[index * 8 : index * 8 + 8])):
                    node.write_metadata(at, entry)
                self.table[index * 8 : index * 8 + 8] = entry
            else:
                self._grow_table(cluster, index, place)
        except BaseException:
            if not own:
                self.change(place, 1, -1)
            self.free_index = min(self.free_index, place)
            raise
        node.write_back.barrier = True
        node.metadata.add(place, 1)
        node.allocator.use(place, 1)
        self.cache.put(index, block)
        self.verification.again()

    def _grow_table(self, cluster: int, index: int, place: int) -> None:
        """Move to a larger table, behind everything that exists, which names block *index* at cluster *place*."""
        from cowhand.block.formats.qcow2.refcount import refcount_area

        used = -(-(max(cluster, place) + 1) // self.per_block)
        refcount_area.make(self, used * self.per_block, known=(index, place))

    def switch_table(self, cluster: int, table: bytearray) -> None:
        """Make *table*, stable at host *cluster*, the image's refcount table by one header field, and free the old one."""
        node = self.node
        old, old_count = node.header.refcount_table_offset // self.cluster_size, node.header.refcount_table_clusters
        clusters = len(table) // self.cluster_size
        node.switch_header(refcount_table_offset=cluster * self.cluster_size, refcount_table_clusters=clusters)
        self.table = table
        node.metadata.add(cluster, clusters)
        node.metadata.remove(old, old_count)
        if old_count:
            try:
                self.change(old, old_count, -1)
            except CowhandError as error:
                # The new table is the image's already, so nothing of it is to be taken back.
                diagnostics.report(f"qcow2_free_clusters failed: {error.qemu()}")

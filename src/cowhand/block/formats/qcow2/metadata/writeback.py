"""The order in which a qcow2 image's metadata reaches its file.

0. The file becomes as long as its last cluster of guest data.
1. Reference counts, and L2 tables that no L1 entry on disk names yet.
2. A barrier (flush of the file), which makes these and all guest data of new clusters stable.
3. Other L2 tables, and the L1 table.
4. A flush.

Counts fall only after step 4 (quarantine), so they never depend on tables, and no cycle can arise. Copies of the dirty pages are taken with
the allocation lock held, all at one moment, and written without it: who writes data meanwhile does not wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.format_io.table_cache import Piece
from cowhand.core.errors import CowhandError
from cowhand.core.locks import RANK_FLUSH, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.refcount.allocator import Freed


class WriteBack:
    """Writes back one image's metadata. ``lock`` (rank FLUSH) is held by one write-back or exclusive operation at a time."""

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.lock = ranked_lock(RANK_FLUSH, "write-back")
        self.barrier = (
            False  #: something was linked since the last flush that must not be reached before its bytes are stable
        )
        self._ticket = 0  #: flushes begun
        self._done = 0  #: the newest flush that has ended well

    def flush(self) -> None:
        """Make everything stable that was done before the call. Takes the locks; flushes that wait for one another become one."""
        with self.node.lock:
            mine = self._ticket
        with self.lock:
            # A flush that began after this call has done this one's work.
            if self._done > mine:
                return
            with self.node.lock:
                self._ticket += 1
                ticket = self._ticket
            try:
                self.run()
                self.node.trust_counts()
            except CowhandError:
                raise
            except BaseException as error:
                # Of what was taken out of the lists of changes some may not be back in them.
                self.node.set_poison(error)
                raise
            self._done = ticket

    def run(self, *, locked: bool = False) -> None:
        """Do one write-back, with the write-back lock held; *locked*: with the allocation lock too."""
        if locked:
            work = self._collect(held=True)
        else:
            with self.node.lock:
                work = self._collect()
        first, second, freed, barrier = work
        if not (first or second or freed or barrier or self.node.changed):
            return
        # With the lock held: who finds nothing changed and the lock free may rely on a flush that has ended.
        self.node.changed = False
        try:
            if self.node.blank_end:
                self._fill_last_cluster(locked=locked)
            self._write(first, "refblock_update_part")
            if second and (first or barrier):
                self.node.flush_all()
            if second:
                for piece in first:
                    # Even if what follows fails: an L1 entry on disk may name it from now on, and it is stable as it was copied.
                    piece.table.fresh = False
            self._write(second, "l2_update")
            self.node.flush_all()
        except BaseException:
            if locked:
                self._restore(first, second, freed, barrier)
            else:
                with self.node.lock:
                    self._restore(first, second, freed, barrier)
            self.node.changed = True
            raise
        if locked:
            self._ended(first, second, freed)
        else:
            with self.node.lock:
                self._ended(first, second, freed)

    def _fill_last_cluster(self, *, locked: bool) -> None:
        """Have the file hold the whole of its last cluster before an entry names it: not everybody reads zeroes behind the end of a file."""
        node = self.node
        if not locked:
            with node.lock:  # so that nobody is given space behind all that is given now
                self._fill_last_cluster(locked=True)
            return
        if not node.external:
            end, limit = node.blank_end, node.allocator.high_water
            node.file.node.extend(end, max(end, limit))
        node.blank_end = 0

    def _collect(self, *, held: bool = False) -> tuple[list[Piece], list[Piece], list[Freed], bool]:
        node = self.node
        first = [] if node.lazy else node.refcounts.cache.collect(held=held)
        second: list[Piece] = []
        for piece in node.mapping.cache.collect(held=held):
            (first if piece.fresh else second).append(piece)
        l1 = node.mapping.l1
        if l1.dirty:
            node.mapping.cache.dirty[id(l1)] = l1
            second.extend(node.mapping.cache.collect(held=held))
        barrier, self.barrier = self.barrier, False
        return first, second, node.allocator.collect(), barrier

    def _restore(self, first: list[Piece], second: list[Piece], freed: list[Freed], barrier: bool) -> None:
        node = self.node
        tables = [*first, *second]
        counts = {id(table) for table in node.refcounts.cache.tables.values()}
        node.refcounts.cache.restore([piece for piece in tables if id(piece.table) in counts])
        node.mapping.cache.restore([piece for piece in tables if id(piece.table) not in counts])
        node.mapping.cache.dirty.pop(id(node.mapping.l1), None)
        node.allocator.restore(freed)
        self.barrier = self.barrier or barrier

    def _ended(self, first: list[Piece], second: list[Piece], freed: list[Freed]) -> None:
        self.node.mapping.cache.written(first)
        self.node.mapping.cache.written(second)
        self.node.allocator.stamp(freed)

    def _write(self, pieces: list[Piece], event: str) -> None:
        node = self.node
        l1 = node.mapping.l1
        for piece in pieces:
            name = (
                "l1_update"
                if piece.table is l1
                else "l2_alloc_write"
                if piece.fresh and event != "l2_update"
                else event
            )
            for host, data in piece.writes:
                node.fire(name)
                node.write_metadata(host, data, in_flush=True)

    def flush_refcounts(self) -> None:
        """Write the reference counts now, and flush (both locks held)."""
        cache = self.node.refcounts.cache
        pieces = cache.collect(held=True)
        try:
            self._write(pieces, "refblock_update_part")
            if pieces:
                self.node.flush_file()
        except BaseException:
            cache.restore(pieces)
            self.node.changed = True
            raise
        cache.written(pieces)

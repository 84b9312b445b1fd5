"""Taking and giving back host clusters of a qcow2 image.

Clusters are taken first fit from the lowest free one on, as QEMU does. What is freed goes into quarantine: it keeps its reference count, on
disk and in memory, until the flush that made the disk forget the last reference has ended, *and* every request that was in flight then has
ended. Only then its count falls, and it can be taken again. So a request that is suspended inside an in-place write destroys nobody, and
a crash leaks clusters at worst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cowhand.block.format_io.reservations import Unprepared
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount.refcounts import MissingBlock
from cowhand.block.graph.request_order import next_number, oldest_in_flight
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, NoSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Bytes in quarantine past which the allocator flushes by itself: what a file may grow by for want of a flush. More of it for large files (this
#: part of them), so that discarding all of one does not flush without end, up to the second number.
QUARANTINE_LIMITS = (8 << 20, 64 << 20)
_QUARANTINE_SHIFT = 8


class Freed(NamedTuple):
    """Host clusters that lost a reference. ``discard``: hand the space back to the file system when nothing refers to them any more."""

    cluster: int
    clusters: int
    discard: bool


class Allocator:
    """Space of one image. Methods need the allocation lock unless they say otherwise."""

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.refcounts = node.refcounts
        self.cluster_size = node.cluster_size
        self.next_byte = 0  #: where the next compressed cluster goes, 0 for a new host cluster
        #: Bytes: nothing was ever stored in the file from here on. What a crash left behind counted clusters is still in the file.
        self.high_water = node.file.node.size
        self._unflushed: list[Freed] = []  #: freed, and the disk may still refer to it
        self._stamped: list[
            tuple[int, list[Freed]]
        ] = []  #: (sequence number, freed): waits for the requests before that number
        #: Of what was freed, on its way out of these lists: in a flush, or about to be counted down.
        self._flushing: list[Freed] = []
        self._leaving: list[Freed] = []
        self.fresh = False  #: whether what :meth:`take` gave last reads as zeroes, having never been written
        self.held = 0  #: bytes in quarantine
        self.unflushed_bytes = 0  #: of these, the bytes that a flush would move on

    # -- taking

    def use(self, first: int, count: int) -> bool:
        """Remember that the file holds something at *count* clusters from *first* on; tell whether it never did so before."""
        begin, end = first * self.cluster_size, (first + count) * self.cluster_size
        fresh = begin >= self.high_water
        self.high_water = max(self.high_water, end)
        mapping = self.node.mapping
        mapping.end = max(mapping.end, end)
        return fresh

    def take(self, count: int, what: str | None = None) -> int:
        """Return the first of *count* adjoining clusters, counted; *what* they are for, where the first cluster of all is refused by a name.

        Raises :class:`cowhand.block.format_io.reservations.Unprepared` when a refcount block must be made first (with
        the write-back lock), NoSpace, and ImageCorrupt when what counts as free is metadata.
        """
        refcounts = self.refcounts
        self.node.fire("cluster_alloc")
        while True:
            first = refcounts.find_free(refcounts.free_index, count)
            refcounts.free_index = first + count
            try:
                refcounts.change(first, count, 1)
                self._refuse_metadata(first, count, what)
            except MissingBlock as missing:
                self._prepare(missing.cluster, first)
                continue
            except CowhandError:
                refcounts.free_index = min(refcounts.free_index, first)
                raise
            self.fresh = self.use(first, count)
            return first

    def take_runs(self, count: int) -> list[tuple[int, int, bool]]:
        """Take *count* clusters wherever they are free, the lowest first; return (first, how many, fresh) of the runs that they make.

        For those who do not need them to adjoin: holes are filled, as if each was taken by itself. Raises as :meth:`take`; then nothing is taken.
        """
        runs: list[tuple[int, int, bool]] = []
        refcounts = self.refcounts
        try:
            while count:
                first = refcounts.find_free(refcounts.free_index, 1)
                have = max(1, refcounts.free_run(first, count))
                runs.append((self.take(have), have, self.fresh))
                count -= have
        except BaseException:
            for first, have, _ in runs:
                self.untake(first, have)
            raise
        return runs

    def take_at(self, first: int, count: int) -> int:
        """Take those of *count* clusters from *first* on that lie before the first in use; return how many."""
        refcounts = self.refcounts
        have = refcounts.free_run(first, count)
        if not have:
            return 0
        try:
            refcounts.change(first, have, 1)
            self._refuse_metadata(first, have, None)
        except MissingBlock as missing:
            self._prepare(missing.cluster, refcounts.free_index, spared=first)
            return self.take_at(first, count)
        self.fresh = self.use(first, have)
        return have

    def _refuse_metadata(self, first: int, count: int, what: str | None) -> None:
        """Raise, and take what was counted back, when clusters that counted as free are metadata, or may be."""
        try:
            self._refuse_first(first, what)
            self.node.check_overlap(first * self.cluster_size, count * self.cluster_size)
        except CowhandError:
            self.refcounts.change(first, count, -1)
            self.node.changed = True
            raise

    def _refuse_first(self, cluster: int, what: str | None) -> None:
        """Raise ImageCorrupt when damaged counts call the header's cluster free."""
        if not cluster and what is not None:
            raise self.node.mark_corrupt(f"Preventing invalid allocation of {what} at offset 0", offset=0)

    def _prepare(self, cluster: int, first: int, spared: int | None = None) -> None:
        """Have the block made that counts *cluster*, which a run from *first* on needs; it is put behind that run.

        With *spared* it is put where QEMU puts it that has counted a run from there up to *cluster*: not into these.
        """
        node, refcounts = self.node, self.refcounts

        def add_now() -> None:
            try:
                if spared is not None and spared <= refcounts.find_free(refcounts.free_index, 1) < cluster:
                    refcounts.free_index = cluster
                if not refcounts.block_offset(cluster // refcounts.per_block):
                    refcounts.add_block(cluster)
            finally:
                refcounts.free_index = min(refcounts.free_index, first)

        if node.exclusive_held:
            add_now()
            return

        def add() -> None:
            with node.exclusive():
                add_now()

        raise Unprepared(add)

    def untake(self, first: int, count: int) -> None:
        """Give clusters back that nothing ever referred to, not even in memory. Never raises; a leak at worst."""
        try:
            self.refcounts.change(first, count, -1)
        except CowhandError as error:
            diagnostics.report(f"qcow2_free_clusters failed: {error.qemu()}")

    def take_bytes(self, nbytes: int) -> int:
        """Return the byte offset of room for *nbytes* of compressed data, which may share clusters with others."""
        size = self.cluster_size
        refcounts = self.refcounts
        offset = self.next_byte
        if offset and refcounts.get(offset // size) >= refcounts.counts.maximum:
            offset = 0
        room = size - offset % size if offset else 0
        if room < nbytes:
            fresh = refcounts.find_free(refcounts.free_index, 1)
            self._refuse_first(fresh, "compressed cluster")
            if not offset or -(-offset // size) != fresh:
                offset = fresh * size
            self.node.check_overlap(fresh * size, size)
        if offset + nbytes > L.compressed_limit(self.node.header.cluster_bits):
            raise NoSpace("compressed clusters cannot lie as far back in the file", path=self.node.filename, errno=27)
        first, last = offset // size, (offset + nbytes - 1) // size
        try:
            refcounts.change(first, last - first + 1, 1)
        except MissingBlock as missing:
            self.next_byte = 0
            self._prepare(missing.cluster, first)
            return self.take_bytes(nbytes)
        refcounts.free_index = max(refcounts.free_index, last + 1) if room < nbytes else refcounts.free_index
        end = offset + nbytes
        self.next_byte = end if end % size else 0
        return offset

    def close_room(self, first: int, count: int) -> None:
        """Put nothing more behind compressed data in such of *count* clusters from *first* on as became free: they may be anybody's next."""
        cluster = self.next_byte // self.cluster_size
        if self.next_byte and first <= cluster < first + count and not self.refcounts.get(cluster):
            self.next_byte = 0

    # -- giving back

    def free(self, cluster: int, count: int, *, discard: bool = False) -> None:
        """Put clusters that just lost a reference in memory into quarantine; on a damaged image they leak."""
        try:
            self.refcounts.get(cluster)
        except CowhandError as error:
            diagnostics.report(f"qcow2_free_clusters failed: {error.qemu()}")
            return
        self._unflushed.append(Freed(cluster, count, discard))
        self.held += count * self.cluster_size
        self.unflushed_bytes += count * self.cluster_size

    def forget(self) -> None:
        """Forget what was freed: the tables in which it counted are gone, and nobody can reach it any more."""
        self._unflushed, self._stamped, self._flushing, self._leaving = [], [], [], []
        self.next_byte = self.held = self.unflushed_bytes = 0

    def waiting(self, cluster: int) -> int:
        """Return how many references to *cluster* are in quarantine."""
        return sum(part.cluster <= cluster < part.cluster + part.clusters for part in self.in_quarantine())

    def in_quarantine(self) -> Iterator[Freed]:
        """Yield everything whose count still tells of a reference that the tables in memory have lost."""
        yield from self._unflushed
        yield from self._flushing
        for _, freed in self._stamped:
            yield from freed
        yield from self._leaving

    def collect(self) -> list[Freed]:
        """Return what was freed before the flush that begins now."""
        freed, self._unflushed = self._unflushed, []
        self._flushing = freed
        self.unflushed_bytes = 0
        return freed

    def restore(self, freed: list[Freed]) -> None:
        """That flush failed."""
        self._flushing = []
        self._unflushed[:0] = freed
        self.unflushed_bytes += sum(part.clusters for part in freed) * self.cluster_size

    def stamp(self, freed: list[Freed]) -> None:
        """That flush has ended: the disk no longer refers to *freed*; requests in flight still may."""
        self._flushing = []
        if freed:
            self._stamped.append((next_number(), freed))

    @property
    def crowded(self) -> bool:
        """True when so much waits for a flush that one is worth its time."""
        least, most = QUARANTINE_LIMITS
        waiting = self.unflushed_bytes
        return waiting > least and waiting > min(most, self.high_water >> _QUARANTINE_SHIFT)

    @property
    def ripe(self) -> bool:
        """True when something in quarantine can be made free."""
        return bool(self._stamped) and self._stamped[0][0] < oldest_in_flight(self.node)

    def ready(self, *, everything: bool = False) -> list[Freed]:
        """Take from quarantine what no request in flight can reach any more (*everything*: nobody is left)."""
        if not self._stamped:
            return []
        oldest = None if everything else oldest_in_flight(self.node)
        out: list[Freed] = []
        while self._stamped and (oldest is None or self._stamped[0][0] < oldest):
            out.extend(self._stamped.pop(0)[1])
        self._leaving += out
        return out

    def release(self, freed: list[Freed]) -> None:
        """Count *freed* down. Never raises: on a damaged image the clusters leak, and the user hears of it."""
        leaving = {id(part) for part in freed}
        self._leaving = [part for part in self._leaving if id(part) not in leaving]
        for part in freed:
            self.held -= part.clusters * self.cluster_size
            try:
                self.refcounts.change(part.cluster, part.clusters, -1)
            except CowhandError as error:
                self._release_singly(part, error)

    def _release_singly(self, part: Freed, error: CowhandError) -> None:
        failed = part.clusters == 1
        if not failed:
            for cluster in range(part.cluster, part.cluster + part.clusters):
                try:
                    self.refcounts.change(cluster, 1, -1)
                except CowhandError:
                    failed = True
        if failed:
            diagnostics.report(f"qcow2_free_clusters failed: {error.qemu()}")

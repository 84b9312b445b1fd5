"""Compacting qcow2 in place (QEMU ``docs/interop/qcow2``): clusters at the end of the file move into free ones before, then the file is cut.

What is moved in one round has both places counted from before the first byte is copied until the last reference is switched, and each phase is
stable before the next begins: so a crash leaves leaked clusters and nothing else, and another run, which first gives those back, goes on.
Data clusters and L2 tables move, those of snapshots too. Compressed clusters, L1 tables, reference counts, the snapshot table, bitmaps and an
encryption header stay where they are, and the file does not become shorter than they allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.formats.qcow2 import layout as L
from cowhand.block.formats.qcow2.check import Examination
from cowhand.block.formats.qcow2.repair import forget
from cowhand.block.formats.qcow2.snapshots import read_l1
from cowhand.block.formats.qcow2.tally import encoded, native
from cowhand.core.errors import Cancelled, ImageCorrupt, UnsupportedFeature
from cowhand.core.progress import CancelToken, Progress

if TYPE_CHECKING:
    from cowhand.block.check import CheckResult
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Bytes that are moved before references are switched.
ROUND_BYTES = 4 << 30
_PIECE = 2 << 20
#: Clusters of a file that is compacted: a byte of memory is needed for each.
MAX_CLUSTERS = 1 << 28


class Compaction(NamedTuple):
    """What a compaction did, or would do: lengths of the file, and bytes of clusters ``moved``. ``leaked``: lost clusters found and given back."""

    size_before: int
    size: int
    moved: int
    leaked: int


class _Plan(NamedTuple):
    end: int  #: clusters that the file will have
    sources: Any
    targets: Any


class Compactor:
    """One compaction of *node*, which was opened for a repair and is used by nobody else. Make it and call :meth:`run` once."""

    def __init__(
        self,
        node: Qcow2Node,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
        round_bytes: int = ROUND_BYTES,
    ) -> None:
        import numpy

        self.numpy: Any = numpy
        self.node = node
        self.size = node.cluster_size
        self.bits = node.header.cluster_bits
        self.stride = 2 if node.header.incompatible & L.INCOMPAT_EXTENDED_L2 else 1
        self.external = bool(node.header.incompatible & L.INCOMPAT_DATA_FILE)
        self._progress = progress or Progress()
        self._cancel = cancel or CancelToken()
        self._round = max(1, round_bytes // self.size)
        self._tables: set[int] = set()  #: clusters that hold L2 tables when the plan is made

    def run(self, *, dry_run: bool = False) -> Compaction:
        """Compact, or with *dry_run* only say what would be moved. Raises ImageCorrupt for an image that is not sound, Cancelled, IOFailed."""
        node = self.node
        before = node.file.node.size
        leaked = self._examine(dry_run)
        try:
            plan = self._plan()
            moved = len(plan.sources) * self.size
            if dry_run:
                return Compaction(before, min(before, plan.end * self.size), moved, leaked)
            if moved and node.encryption is not None:
                node.encryption.unlock()  # asks for the secret before anything is changed
            self._progress.total = moved
            for begin in range(0, len(plan.sources), self._round):
                self._cancel.check()
                self._move(plan.sources[begin : begin + self._round], plan.targets[begin : begin + self._round])
            self._cut(plan.end * self.size)
            self._progress.finish()
            return Compaction(before, node.file.node.size, moved, leaked)
        finally:
            forget(node)

    # -- looking

    def _examine(self, dry_run: bool) -> int:
        """Check the image and give lost clusters back; keep the counts of all clusters. Returns how many were lost."""
        exam, result = self._checked(None)
        if result.leaks and not dry_run:
            exam, result = self._checked("leaks")
        if exam.walk.clusters > MAX_CLUSTERS:
            raise UnsupportedFeature(
                f"a file of more than {MAX_CLUSTERS} clusters is not compacted in place",
                path=self.node.filename,
                hint="Convert it instead.",
            )
        self.tally = exam.walk.tally
        self.tally.use_numpy()
        self.clusters = exam.walk.clusters
        return result.leaks_fixed + result.leaks

    def _checked(self, repair: str | None) -> tuple[Examination, CheckResult]:
        exam = Examination(self.node, repair, lambda line: None)
        result = exam.run()
        if result.failure is not None:
            raise result.failure.within("an image is compacted only if its check ends well")
        if result.corruptions or result.check_errors:
            raise ImageCorrupt(
                f"the image is damaged in {result.corruptions + result.check_errors} places, and is not compacted",
                path=self.node.filename, hint="Repair it first: cowhand check -r all",
            )  # fmt: skip
        return exam, result

    def _l1_tables(self) -> dict[tuple[int, int], bytes]:
        """Return {(offset, entries): bytes} of the L1 tables of the disk and its snapshots."""
        node, header = self.node, self.node.header
        found = {(header.l1_offset, header.l1_size): bytes(node.mapping.l1.data[: header.l1_size * 8])}
        for snapshot in node.snapshots:
            found[snapshot.l1_offset, snapshot.l1_size] = read_l1(node, snapshot)
        return found

    def _l2_tables(self) -> Iterator[tuple[int, Any]]:
        """Yield (host offset, entries as a writable numpy array) of each L2 table, once."""
        numpy = self.numpy
        hosts = [
            (numpy.frombuffer(table, ">u8").astype("u8") & numpy.uint64(L.L1_OFFSET_MASK))
            for table in self._l1_tables().values()
        ]
        for host in numpy.unique(numpy.concatenate(hosts)).tolist():
            if host:
                data = bytearray(self.size)
                self.node.file.read_into(host, data)
                yield host, numpy.frombuffer(data, ">u8").astype("u8")

    def _hosts(self, words: Any) -> Any:
        """Return the cluster that each word (entry) of an L2 table names, 0 where it names none that may move."""
        numpy = self.numpy
        hosts = (words & numpy.uint64(L.L2_OFFSET_MASK)) >> numpy.uint64(self.bits)
        hosts[words & numpy.uint64(L.ENTRY_COMPRESSED) != 0] = 0
        if self.stride == 2:
            hosts[1::2] = 0
        if self.external:
            hosts[:] = 0
        return hosts.astype("i8")

    def _plan(self) -> _Plan:
        """Find the shortest file into which everything goes that may move."""
        numpy = self.numpy
        used = numpy.zeros(self.clusters, dtype="?")
        taken = numpy.zeros(self.clusters, dtype="?")  # used, or not to be taken
        per_block = self.node.refcounts.per_block
        table = numpy.frombuffer(bytes(self.node.refcounts.table), ">u8")
        for begin in range(0, self.clusters, per_block):
            end = min(self.clusters, begin + per_block)
            piece = self.tally.piece(begin, end - begin)
            if piece is not None:
                used[begin:end] = numpy.frombuffer(piece, dtype=self.tally.code) != 0
            index = begin // per_block
            # Where no block counts, a cluster could not be taken without making one.
            taken[begin:end] = used[begin:end] if index < len(table) and table[index] else True
        movable = numpy.zeros(self.clusters, dtype="?")
        for host, words in self._l2_tables():
            self._tables.add(host >> self.bits)
            movable[host >> self.bits] = True
            movable[self._hosts(words)] = True
        movable[0] = False
        fixed = numpy.flatnonzero(used & ~movable)
        low, high = int(fixed[-1]) + 1, int(numpy.flatnonzero(used)[-1]) + 1
        while low < high:
            middle = (low + high) // 2
            room = middle - int(numpy.count_nonzero(taken[:middle]))
            if room >= int(numpy.count_nonzero(movable[middle:])):
                high = middle
            else:
                low = middle + 1
        sources = numpy.flatnonzero(movable[low:]) + low
        targets = numpy.flatnonzero(~taken[:low])[: len(sources)]
        return _Plan(low, sources, targets)

    # -- moving

    def _move(self, sources: Any, targets: Any) -> None:
        """Move clusters; every phase is stable before the next begins."""
        numpy, node = self.numpy, self.node
        counts = self.tally.gather(sources)
        self._set_counts(targets, counts)
        node.flush_file()
        try:
            self._copy(sources, targets)
        except Cancelled:
            self._set_counts(targets, numpy.zeros_like(counts))  # nothing refers to them yet
            node.flush_file()
            raise
        node.flush_file()
        moved = numpy.zeros(self.clusters, dtype="u8")
        moved[sources] = targets
        self._switch_entries(moved)
        node.flush_file()
        self._switch_tables(moved)
        node.flush_file()
        self._set_counts(sources, numpy.zeros_like(counts))
        node.flush_file()

    def _set_counts(self, clusters: Any, counts: Any) -> None:
        """Write the reference counts of *clusters*, rising; blocks are written whole."""
        numpy, node, per_block = self.numpy, self.node, self.node.refcounts.per_block
        indices = clusters // per_block
        for index in numpy.unique(indices).tolist():
            host = L.U64.unpack_from(node.refcounts.table, index * 8)[0] & L.REFCOUNT_TABLE_OFFSET_MASK
            data = bytearray(self.size)
            node.file.read_into(host, data)
            values = numpy.frombuffer(native(data, self.tally.order), dtype=self.tally.code).copy()
            chosen = indices == index
            values[clusters[chosen] - index * per_block] = counts[chosen]
            node.write_metadata(host, encoded(values.tobytes(), self.tally.order))

    def _copy(self, sources: Any, targets: Any) -> None:
        """Copy clusters, neighbours together where both ends are."""
        numpy, file = self.numpy, self.node.file
        limit = max(1, _PIECE // self.size)
        breaks = numpy.flatnonzero((numpy.diff(sources) != 1) | (numpy.diff(targets) != 1)) + 1
        edges = [0, *breaks.tolist(), len(sources)]
        for begin, stop in pairwise(edges):
            for first in range(begin, stop, limit):
                self._cancel.check()
                buffer = bytearray(min(limit, stop - first) * self.size)
                file.read_into(int(sources[first]) * self.size, buffer)
                self._reencrypt(int(sources[first]), int(targets[first]), buffer)
                self.node.write_metadata(int(targets[first]) * self.size, buffer)
                self._progress.advance(len(buffer))

    def _reencrypt(self, source: int, target: int, buffer: bytearray) -> None:
        """Have those clusters of *buffer* that hold encrypted data mean at *target* what they meant at *source*."""
        encryption = self.node.encryption
        if encryption is None:
            return
        for index in range(len(buffer) // self.size):
            if source + index not in self._tables:
                data = buffer[index * self.size : (index + 1) * self.size]
                encryption.moved((source + index) * self.size, (target + index) * self.size, data)
                buffer[index * self.size : (index + 1) * self.size] = data

    def _switch_entries(self, moved: Any) -> None:
        """Name the new places of data in the L2 tables: in the new copy of a table that moves, which nobody names yet, or in place."""
        numpy = self.numpy
        for host, words in self._l2_tables():
            place = int(moved[host >> self.bits]) * self.size or host
            self._write_changed(place, words, moved[self._hosts(words)], numpy.uint64(L.L2_OFFSET_MASK))

    def _switch_tables(self, moved: Any) -> None:
        """Name the new places of L2 tables in the L1 tables."""
        numpy = self.numpy
        for (offset, _), table in self._l1_tables().items():
            words = numpy.frombuffer(table, ">u8").astype("u8")
            hosts = ((words & numpy.uint64(L.L1_OFFSET_MASK)) >> numpy.uint64(self.bits)).astype("i8")
            changed = self._write_changed(offset, words, moved[hosts], numpy.uint64(L.L1_OFFSET_MASK))
            if offset == self.node.header.l1_offset:
                self.node.mapping.l1.data[: len(changed)] = changed

    def _write_changed(self, offset: int, words: Any, places: Any, mask: Any) -> bytes:
        """Put the clusters *places* (0: no change) into *words*, write the sectors that change to *offset* on, and return the whole."""
        numpy = self.numpy
        at = numpy.flatnonzero(places)
        words[at] = (words[at] & ~mask) | (places[at] << numpy.uint64(self.bits))
        data: bytes = words.astype(">u8").tobytes()
        if len(at):
            sectors = numpy.unique(at // 64)
            runs = numpy.split(sectors, numpy.flatnonzero(numpy.diff(sectors) != 1) + 1)
            for run in runs:
                begin, end = int(run[0]) * 512, min(len(data), (int(run[-1]) + 1) * 512)
                self.node.write_metadata(offset + begin, data[begin:end])
        return data

    def _cut(self, end: int) -> None:
        """Make the file end at *end*, behind which nothing is used."""
        file = self.node.file.node
        if end < file.size and file.capabilities.resizable:
            self._cancel.check()
            file.resize(end, shrink=True)
            self.node.flush_file()

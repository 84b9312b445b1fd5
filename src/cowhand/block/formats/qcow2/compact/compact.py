"""Compacting qcow2 in place (QEMU ``docs/interop/qcow2``): clusters at the end of the file move into free ones before, then the file is cut.

What is moved in one round has both places counted from before the first byte is copied until the last reference is switched, and each phase is
stable before the next begins: so a crash leaves leaked clusters and nothing else, and another run, which first gives those back, goes on.
Data clusters and L2 tables move, those of snapshots too, and compressed clusters, which are packed anew (``compactpacked``); before and after them
all other metadata (``compactmetadata``), until nothing can move any more. Only an encryption header stays where it is.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.formats.qcow2.check.check import Examination
from cowhand.block.formats.qcow2.check.repair import forget
from cowhand.block.formats.qcow2.compact import metadata
from cowhand.block.formats.qcow2.compact.compressed import Packed, Packer
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount.counted import encoded, native
from cowhand.block.formats.qcow2.resize.shrink import drop_refblocks
from cowhand.block.formats.qcow2.snapshot.table import read_l1
from cowhand.core.errors import Cancelled, ImageCorrupt, UnsupportedFeature
from cowhand.core.progress import CancelToken, Progress

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.node.records import CheckResult

#: Bytes that are moved before references are switched.
ROUND_BYTES = 4 << 30
_PIECE = 2 << 20
_STRETCH = 1 << 19
#: Clusters that one plan moves at most, or a 32nd of all: what is planned is in memory as whole numbers.
_PLANNED = 1 << 19
#: Clusters between the first and the last that are moved together: for each of them a number is in memory.
_SPREAD = 1 << 22
#: What a cluster is to a plan: named by tables, and something else too.
_NAMED, _HELD = 1, 2
#: Rounds of looking and moving; two or three are the rule.
_MOST_ROUNDS = 64
#: Clusters of a file that is compacted: a byte of memory is needed for each.
MAX_CLUSTERS = 1 << 28


class Compaction(NamedTuple):
    """What a compaction did, or would do: lengths of the file, and bytes of clusters ``moved``. ``leaked``: lost clusters found and given back."""

    size_before: int
    size: int
    moved: int
    leaked: int


class _Plan(NamedTuple):
    sources: Any
    targets: Any
    packed: Packed | None  #: compressed clusters that get another place


class _Moves:
    """New clusters by old ones."""

    def __init__(self, numpy: Any, sources: Any, targets: Any) -> None:
        self.numpy = numpy
        self.first = int(sources[0])
        # Clusters of a file that is compacted have numbers of less than 32 bits.
        self.places = numpy.zeros(int(sources[-1]) - self.first + 1, dtype="u4")
        self.places[sources - self.first] = targets

    def of(self, clusters: Any) -> Any:
        """Return the new places of *clusters*, 0 where they stay."""
        at = clusters - self.first
        inside = (at >= 0) & (at < len(self.places))
        return self.numpy.where(inside, self.places[self.numpy.where(inside, at, 0)], 0).astype("u8")


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
        self._rehearsal = False
        self.tally: Any = None  #: the counts of all clusters
        self._tables: set[int] = set()  #: clusters that hold L2 tables when the plan is made

    def run(self, *, rehearsal: bool = False) -> Compaction:
        """Compact. With *rehearsal* the node writes to what is thrown away: then data is not copied, and nothing is cut.

        Raises ImageCorrupt for an image that is not sound, Cancelled, IOFailed.
        """
        before = self.node.file.node.size
        self._rehearsal = rehearsal
        moved = leaked = 0
        try:
            for _ in range(_MOST_ROUNDS):
                leaked += self._examine()
                step = self._metadata() or self._data()
                moved += step
                if not step and not self._drop_blocks():
                    break
            size = min(before, self._end() * self.size)
            if not rehearsal:
                self._cut(size)
                size = self.node.file.node.size
            self._progress.finish()
            return Compaction(before, size, moved, leaked)
        finally:
            forget(self.node)

    def _metadata(self) -> int:
        """Move metadata; return the bytes moved."""
        forget(self.node)
        self._cancel.check()
        moved = metadata.move_down(self.node, int(self.numpy.count_nonzero(self._used())))
        forget(self.node)
        self._progress.total = (self._progress.total or 0) + moved
        self._progress.advance(moved)
        return moved

    def _drop_blocks(self) -> int:
        """Free the refcount blocks behind the end that count nothing any more; return how many there were."""
        forget(self.node)
        with self.node.exclusive():
            self.node.rebuild_metadata_map()
        dropped = drop_refblocks(self.node, -(-self._end() // self.node.refcounts.per_block))
        metadata.settle(self.node)
        return dropped

    def _data(self) -> int:
        """Move what the tables name; return the bytes moved."""
        plan = self._plan()
        moved = len(plan.sources) * self.size + (plan.packed.nbytes if plan.packed is not None else 0)
        if moved and self.node.encryption is not None and not self._rehearsal:
            self.node.encryption.unlock()  # asks for the secret before anything is changed
        self._progress.total = (self._progress.total or 0) + moved
        begin = 0
        while begin < len(plan.sources):
            self._cancel.check()
            near = int(self.numpy.searchsorted(plan.sources, int(plan.sources[begin]) + _SPREAD))
            end = near if self._rehearsal else min(begin + self._round, near)
            self._move(plan.sources[begin:end], plan.targets[begin:end])
            begin = end
        if plan.packed is not None:
            self._cancel.check()
            self._move_packed(plan.packed)
        return moved

    def _end(self) -> int:
        """Return behind which cluster nothing is in use."""
        return int(_last(self.numpy, self._used(), 1)[-1]) + 1

    # -- looking

    def _examine(self) -> int:
        """Check the image and give lost clusters back; keep the counts of all clusters. Returns how many were lost."""
        # The counts of the last round go before others are made; an examination's parts name one another.
        self.tally = None
        gc.collect()
        exam, result = self._checked(None)
        with self.node.exclusive():
            self.node.clear_unknown_marks()  # it is sound, and about to be changed
        if result.leaks:
            del exam
            gc.collect()
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

    def _used(self) -> Any:
        """Return, for each cluster, whether it is in use."""
        numpy = self.numpy
        used = numpy.zeros(self.clusters, dtype="?")
        for begin in range(0, self.clusters, _STRETCH):
            end = min(self.clusters, begin + _STRETCH)
            piece = self.tally.piece(begin, end - begin)
            if piece is not None:
                used[begin:end] = numpy.frombuffer(piece, dtype=self.tally.code) != 0
        return used

    def _plan(self) -> _Plan:
        """Find what moves: from the end of the file into the lowest free clusters, until both meet."""
        numpy = self.numpy
        free = self._used()
        numpy.logical_not(free, out=free)
        per_block = self.node.refcounts.per_block
        table = numpy.frombuffer(bytes(self.node.refcounts.table), ">u8")
        for index in range(-(-self.clusters // per_block)):
            # Where no block counts, a cluster could not be taken without making one.
            if index >= len(table) or not table[index]:
                free[index * per_block : (index + 1) * per_block] = False
        most = max(_PLANNED, self.clusters >> 5)
        free = _first(numpy, free, most)
        if not len(free):
            return _Plan(free, free, None)
        movable = numpy.zeros(self.clusters, dtype="u1")
        self._tables.clear()
        packer = Packer(self.node.header.cluster_bits, self.tally)
        for host, words in self._l2_tables():
            self._tables.add(host >> self.bits)
            movable[host >> self.bits] |= _NAMED
            movable[self._hosts(words)] |= _NAMED
            if not self.external:
                times = int(self.tally.gather(numpy.array([host >> self.bits]))[0])
                for clusters in packer.add(words[:: self.stride], times):
                    movable[clusters[clusters < self.clusters]] |= _HELD
        self._hold(movable)
        movable[: int(free[0])] = 0
        movable = movable == _NAMED
        sources, targets = packer.plan(free, _last(numpy, movable, most))
        return _Plan(numpy.sort(sources), numpy.sort(targets), packer.packed())

    def _hold(self, movable: Any) -> None:
        """Mark in *movable* what is something else besides: its count is not that of the references that are switched when it moves."""
        numpy = self.numpy
        for clusters in metadata.occupied(self.node):
            if isinstance(clusters, range):
                movable[clusters.start : clusters.stop] |= _HELD
            else:
                known = numpy.fromiter(clusters, dtype="i8", count=len(clusters))
                movable[known[known < self.clusters]] |= _HELD

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
        moved = _Moves(numpy, sources, targets)
        self._switch_entries(moved)
        node.flush_file()
        self._switch_tables(moved)
        node.flush_file()
        self._set_counts(sources, numpy.zeros_like(counts))
        node.flush_file()

    def _move_packed(self, packed: Packed) -> None:
        """Give compressed clusters their new places, in the same phases."""
        numpy, node = self.numpy, self.node
        targets = numpy.array(sorted(packed.gained), dtype="i8")
        gained = numpy.array([packed.gained[cluster] for cluster in targets.tolist()], dtype=self.tally.code)
        self._set_counts(targets, gained)
        node.flush_file()
        try:
            for source, target, length in () if self._rehearsal else packed.pieces:
                self._cancel.check()
                buffer = bytearray(length)
                node.file.read_into(source, buffer)
                node.write_metadata(target, buffer)
                self._progress.advance(length)
        except Cancelled:
            self._set_counts(targets, numpy.zeros_like(gained))  # nothing refers to them yet
            node.flush_file()
            raise
        node.flush_file()
        old, new = packed.entries(numpy)
        for host, words in self._l2_tables():
            changed = words.copy()
            column = changed[:: self.stride]
            at = numpy.flatnonzero(column & numpy.uint64(L.ENTRY_COMPRESSED))
            places = numpy.minimum(numpy.searchsorted(old, column[at]), len(old) - 1)
            found = old[places] == column[at]
            column[at[found]] = new[places[found]]
            self._write_words(host, words, changed)
        node.flush_file()
        sources = numpy.array(sorted(packed.lost), dtype="i8")
        lost = numpy.array([packed.lost[cluster] for cluster in sources.tolist()], dtype=self.tally.code)
        self._set_counts(sources, self.tally.gather(sources) - lost)
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
                if self._rehearsal and not self._tables.intersection(
                    range(sources[first], sources[first] + min(limit, stop - first))
                ):
                    continue
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

    def _switch_entries(self, moved: _Moves) -> None:
        """Name the new places of data in the L2 tables: in the new copy of a table that moves, which nobody names yet, or in place."""
        numpy = self.numpy
        for host, words in self._l2_tables():
            place = int(moved.of(numpy.array([host >> self.bits]))[0]) * self.size or host
            self._write_changed(place, words, moved.of(self._hosts(words)), numpy.uint64(L.L2_OFFSET_MASK))

    def _switch_tables(self, moved: _Moves) -> None:
        """Name the new places of L2 tables in the L1 tables."""
        numpy = self.numpy
        for (offset, _), table in self._l1_tables().items():
            words = numpy.frombuffer(table, ">u8").astype("u8")
            hosts = ((words & numpy.uint64(L.L1_OFFSET_MASK)) >> numpy.uint64(self.bits)).astype("i8")
            changed = self._write_changed(offset, words, moved.of(hosts), numpy.uint64(L.L1_OFFSET_MASK))
            if offset == self.node.header.l1_offset:
                self.node.mapping.l1.data[: len(changed)] = changed

    def _write_changed(self, offset: int, words: Any, places: Any, mask: Any) -> bytes:
        """Put the clusters *places* (0: no change) into *words*, write the sectors that change to *offset* on, and return the whole."""
        numpy = self.numpy
        at = numpy.flatnonzero(places)
        changed = words.copy()
        changed[at] = (words[at] & ~mask) | (places[at] << numpy.uint64(self.bits))
        return self._write_words(offset, words, changed)

    def _write_words(self, offset: int, words: Any, changed: Any) -> bytes:
        """Write the sectors in which *changed* differs from *words* to *offset* on; return the whole."""
        numpy = self.numpy
        data: bytes = changed.astype(">u8").tobytes()
        at = numpy.flatnonzero(words != changed)
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


def _first(numpy: Any, marks: Any, count: int) -> Any:
    """Return the lowest numbers, at most about *count*, of what is marked, rising."""
    found, have = [], 0
    for begin in range(0, len(marks), _STRETCH):
        found.append(numpy.flatnonzero(marks[begin : begin + _STRETCH]) + begin)
        have += len(found[-1])
        if have >= count:
            break
    return numpy.concatenate(found)


def _last(numpy: Any, marks: Any, count: int) -> Any:
    """Return the highest numbers, at most about *count*, of what is marked, rising."""
    found, have = [], 0
    for begin in reversed(range(0, len(marks), _STRETCH)):
        found.append(numpy.flatnonzero(marks[begin : begin + _STRETCH]) + begin)
        have += len(found[-1])
        if have >= count:
            break
    return numpy.concatenate(found[::-1])

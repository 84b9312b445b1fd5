"""Changing the reference counts of very many clusters of a qcow2 image at once: by whole refcount blocks, and all or none."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount.counted import Tally, encoded, native
from cowhand.block.formats.qcow2.refcount.l2_scan import Scanner
from cowhand.core.errors import ImageCorrupt, InvalidFormat

if TYPE_CHECKING:
    from cowhand.block.format_io.table_cache import Table
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Counts in the blocks that change from which numpy is worth its import.
_MANY_COUNTS = 1 << 19
#: Blocks whose counts are kept as whole numbers at once.
_BLOCKS_TOGETHER = 64


def references(node: Qcow2Node, l1: bytes) -> Tally:
    """Return how often the L1 table *l1*, big-endian as on disk, refers to each host cluster: L2 tables, and all that they name.

    Raises ImageCorrupt for what cannot be followed, and InvalidFormat when counts cannot be as high. The node is settled: its tables are as
    on disk.
    """

    def overflow(cluster: int, _times: int) -> None:
        raise too_high(node, cluster)

    header = node.header
    tally = Tally(header.refcount_order, -(-node.file.node.size // node.cluster_size), overflow)
    scanner = Scanner(
        header.cluster_bits, tally, L.MAX_HOST_OFFSET, extended=bool(header.incompatible & L.INCOMPAT_EXTENDED_L2),
        external=bool(header.incompatible & L.INCOMPAT_DATA_FILE),
    )  # fmt: skip
    for host, times in l2_tables(node, l1).items():
        tally.add(host // node.cluster_size, 1, times)
        data = read_table(node, host)
        if scanner.scan(data, times) is None:
            _refuse_unreachable(node, data)
            raise node.mark_corrupt(
                f"L2 table at {host:#x} has entries that are not possible", offset=host, fatal=False
            )
    return tally


def _refuse_unreachable(node: Qcow2Node, data: bytes) -> None:
    """Raise InvalidFormat when an entry of the L2 table *data* names a cluster that no refcount table is large enough for."""
    limit = L.MAX_REFCOUNT_TABLE_BYTES // L.ENTRY_SIZE * node.refcounts.per_block * node.cluster_size
    for (entry,) in L.U64.iter_unpack(data):
        host = entry & L.L2_OFFSET_MASK
        if not entry & L.ENTRY_COMPRESSED and host >= limit:
            raise InvalidFormat(
                f"a cluster at {host:#x} cannot be counted: reference counts end at {limit:#x}", qemu="File too large",
                path=node.filename, offset=host, errno=errno.EFBIG,
            )  # fmt: skip


def l2_tables(node: Qcow2Node, l1: bytes) -> dict[int, int]:
    """Return {host offset: times} of the L2 tables that *l1* names. Raises ImageCorrupt for an impossible offset."""
    found: dict[int, int] = {}
    most = node.file.node.size // node.cluster_size + 1
    for index, (entry,) in enumerate(L.U64.iter_unpack(l1)):
        host = entry & L.L1_OFFSET_MASK
        if not host:
            continue
        if len(found) > most:
            raise _wrong(node, host // node.cluster_size)  # more tables than the file has clusters
        if host % node.cluster_size:
            raise node.mark_corrupt(f"L2 table offset {host:#x} unaligned (L1 index: {L.c_hex(index)})", offset=host)
        found[host] = found.get(host, 0) + 1
    return found


def read_table(node: Qcow2Node, host: int) -> bytes:
    """Return the L2 table at *host* from the file; behind the file's end lie zeroes."""
    data = bytearray(node.cluster_size)
    if host < node.file.node.size:
        node.file.read_into(host, data)
    return bytes(data)


def too_high(node: Qcow2Node, cluster: int) -> InvalidFormat:
    """Return the error for a count that its width does not allow."""
    counts = node.refcounts.counts
    return InvalidFormat(
        f"the reference count of cluster {cluster} would be more than {counts.maximum}, which its width of {counts.bits} bits allows",
        qemu="Invalid argument", path=node.filename, offset=cluster * node.cluster_size,
        hint="Amend the image to wider reference counts.",
    )  # fmt: skip


def _wrong(node: Qcow2Node, cluster: int) -> ImageCorrupt:
    return ImageCorrupt(
        f"the reference count of cluster {cluster} does not fit the tables that refer to it", qemu="Invalid argument",
        path=node.filename, offset=cluster * node.cluster_size, hint="Repair the image first.",
    )  # fmt: skip


def verify(node: Qcow2Node, change: Tally, sign: int) -> None:
    """Raise what adding (*sign* 1) or taking away (-1) *change* would; nothing is changed.

    Raises InvalidFormat when a count would be too high, ImageCorrupt when one would fall below zero, or was zero although it is referred to.
    """
    for _ in _changes(node, change, sign):
        pass


def apply(node: Qcow2Node, change: Tally, sign: int) -> list[tuple[int, int]]:
    """Add or take away *change* in memory, all or nothing; return the runs (first, clusters) that become free. Raises as :func:`verify`.

    The next write-back brings the counts to the disk.
    """
    refcounts, allocator = node.refcounts, node.allocator
    # All blocks are in the cache then: nothing fails from here on, and no second copy of them is needed.
    verify(node, change, sign)
    freed: list[tuple[int, int]] = []
    for index, block, old, new in _changes(node, change, sign):
        if sign < 0:
            freed += _newly_zero(change, index * refcounts.per_block, old, new)
        block.data[:] = encoded(new, change.order)
        refcounts.cache.touch(block, 0, len(block.data))
    if freed:
        refcounts.free_index = min(refcounts.free_index, freed[0][0])
    if allocator.next_byte and not refcounts.get(allocator.next_byte // node.cluster_size):
        allocator.next_byte = 0
    return freed


def _changes(node: Qcow2Node, change: Tally, sign: int) -> Iterator[tuple[int, Table, bytes, bytes]]:
    """Yield (index, block, native counts before, after) of the blocks that *change* touches."""
    refcounts = node.refcounts
    per_block = refcounts.per_block
    touched = list(change.used_blocks(per_block))
    if len(touched) * per_block >= _MANY_COUNTS:
        # However the references were counted: here each count is looked at.
        change.use_numpy()
    for index in touched:
        first = index * per_block
        delta = change.piece(first, per_block)
        if delta is None or not delta.strip(b"\0"):
            continue
        block = refcounts.block(index)
        if block is None:
            at = (len(delta) - len(delta.lstrip(b"\0"))) // change.width
            wrong = _wrong(node, first + at)
            wrong.errno = errno.EAGAIN  # as QEMU says of a cluster that no block counts
            raise wrong
        old = native(block.data, change.order)
        yield index, block, old, _added(node, change, first, old, delta, sign)


def _added(node: Qcow2Node, change: Tally, first: int, old: bytes, delta: bytes, sign: int) -> bytes:
    """Return the native counts *old* + sign * *delta*, each checked."""
    if change.numpy is not None:
        return _added_fast(node, change, first, old, delta, sign)
    counts, steps = memoryview(old).cast(change.code), memoryview(delta).cast(change.code)
    most = change.maximum
    # There are few different pairs, and with all of them sound no count runs over into the next: one addition of large numbers does it.
    for value, step in set(zip(counts, steps, strict=True)):
        if step and (value == 0 or not 0 <= value + sign * step <= most):
            break
    else:
        order = sys.byteorder
        total = int.from_bytes(old, order) + sign * int.from_bytes(delta, order)
        return total.to_bytes(len(old), order)
    for at, (value, step) in enumerate(zip(counts, steps, strict=True)):
        if step and (value == 0 or value + sign * step < 0):
            raise _wrong(node, first + at)
        if step and value + sign * step > most:
            raise too_high(node, first + at)
    raise AssertionError("a pair of counts is wrong in one place and in none")


def _added_fast(node: Qcow2Node, change: Tally, first: int, old: bytes, delta: bytes, sign: int) -> bytes:
    numpy = change.numpy
    counts, steps = numpy.frombuffer(old, dtype=change.code), numpy.frombuffer(delta, dtype=change.code)
    touched = steps != 0
    low = touched & ((counts == 0) | (counts < steps if sign < 0 else False))
    if low.any():
        raise _wrong(node, first + int(numpy.flatnonzero(low)[0]))
    if sign > 0:
        high = touched & (counts > change.maximum - steps.astype("u8"))
        if high.any():
            raise too_high(node, first + int(numpy.flatnonzero(high)[0]))
    out: bytes = (counts + steps if sign > 0 else counts - steps).astype(change.code).tobytes()
    return out


def _newly_zero(change: Tally, first: int, old: bytes, new: bytes) -> list[tuple[int, int]]:
    """Return the runs of clusters whose count was not zero and is now."""
    before, after = memoryview(old).cast(change.code), memoryview(new).cast(change.code)
    if not new.strip(b"\0") and old == old[: change.width] * len(before):
        return [(first, len(before))]
    if change.numpy is not None:
        numpy = change.numpy
        gone = numpy.flatnonzero((numpy.asarray(before) != 0) & (numpy.asarray(after) == 0)).tolist()
    elif any(value and not later for value, later in set(zip(before, after, strict=True))):
        gone = [at for at, value in enumerate(before) if value and not after[at]]
    else:
        gone = []
    runs: list[tuple[int, int]] = []
    for at in gone:
        if runs and runs[-1][0] + runs[-1][1] == first + at:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((first + at, 1))
    return runs


class PresentCounts:
    """The image's counts in those refcount blocks in which *like* counts something, 0 in others; answers as a Tally does, and copies nothing."""

    def __init__(self, node: Qcow2Node, like: Tally) -> None:
        self.node = node
        self.numpy = like.numpy
        self._order, self._code, self._width = like.order, like.code, like.width
        self._per_block = node.refcounts.per_block
        self._blocks = frozenset(like.used_blocks(self._per_block))
        self._last: tuple[int, bytes | None] = (-1, None)

    def _native(self, index: int) -> bytes | None:
        """Return the counts of block *index* as whole numbers of the machine, None where all are taken for zero."""
        if self._last[0] != index:
            block = self.node.refcounts.block(index) if index in self._blocks else None
            self._last = index, None if block is None else native(block.data, self._order)
        return self._last[1]

    def get(self, cluster: int) -> int:
        """Return the count of *cluster*."""
        index, at = divmod(cluster, self._per_block)
        values = self._native(index)
        return int(memoryview(values).cast(self._code)[at]) if values is not None else 0

    def is_all(self, first: int, count: int, value: int) -> bool:
        """Tell whether *count* clusters from *first* on all have the count *value*."""
        one, end = value.to_bytes(self._width, sys.byteorder), first + count
        while first < end:
            index, at = divmod(first, self._per_block)
            step = min(end - first, self._per_block - at)
            values = self._native(index)
            if values is None:
                if value:
                    return False
            elif values[at * self._width : (at + step) * self._width] != one * step:
                return False
            first += step
        return True

    def each(self, clusters: Sequence[int]) -> Sequence[int]:
        """Return the counts of *clusters*."""
        per_block, views = self._per_block, {}
        for index in sorted({cluster // per_block for cluster in clusters}):
            values = self._native(index)
            if values is not None:
                views[index] = memoryview(values).cast(self._code)
            if len(views) > _BLOCKS_TOGETHER:
                return [self.get(cluster) for cluster in clusters]
        return [
            views[cluster // per_block][cluster % per_block] if cluster // per_block in views else 0
            for cluster in clusters
        ]

    def gather(self, clusters: Any) -> Any:
        """Return the counts of the numpy array *clusters*, in its order."""
        numpy = self.numpy
        out = numpy.zeros(len(clusters), dtype=self._code)
        indices = clusters // self._per_block
        for index in numpy.unique(indices).tolist():
            values = self._native(index)
            if values is not None:
                chosen = indices == index
                out[chosen] = numpy.frombuffer(values, dtype=self._code)[clusters[chosen] % self._per_block]
        return out

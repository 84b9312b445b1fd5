"""What differs between a disk and what would show through in it from another backing file: found from extents, then from bytes.

Nothing is read where both sides are known to be zero, or lie at the same place of the same file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.graph.block_status import skip_filters
from cowhand.block.opening.json_names import PREFIX
from cowhand.copy.engine import plan
from cowhand.copy.engine.compressed_sink import CompressedSink
from cowhand.copy.engine.plan import Run
from cowhand.copy.engine.sink import LaneSink, Parts, Sink, lane_of
from cowhand.core.buffers import fill_zero, is_zero
from cowhand.core.errors import NotSupported
from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, ENCODED, OFFSET, ZERO, Extent

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.node import BlockNode

SECTOR = 512
_PLACED = DATA | OFFSET
_PLACED_MASK = DATA | OFFSET | COMPRESSED | ENCODED | ZERO
_Key = tuple[int, int]


class Files:
    """Tells which nodes are the same file. Used by one thread."""

    def __init__(self) -> None:
        self._known: dict[int, _Key | None] = {}

    def key(self, node: BlockNode | None) -> _Key | None:
        """Return what identifies the file at the bottom of *node*; None where nothing does."""
        if node is None:
            return None
        if id(node) not in self._known:
            self._known[id(node)] = self._look(node)
        return self._known[id(node)]

    def _look(self, node: BlockNode) -> _Key | None:
        while node.primary is not None:
            node = node.primary.node
        descriptor = getattr(node, "fd", None)
        if descriptor is None:
            return None
        found = os.fstat(descriptor)
        return found.st_dev, found.st_ino


def shared_from(top: Disk, below: Disk | None, files: Files) -> int | None:
    """Return how many layers lie above *below* in *top*'s own chain; None when it is no part of that."""
    if below is None:
        return None
    layer = skip_filters(below.root)
    if files.key(layer) is None:
        return None
    depth, node = 0, skip_filters(top.root)
    while (child := node.backing) is not None:
        depth, node = depth + 1, skip_filters(child.node)
        if _same_chain(node, layer, files):
            return depth
    return None


def _same_chain(one: BlockNode, other: BlockNode, files: Files) -> bool:
    """Tell whether two layers, and those below, are the same: not where one is read as raw, from another offset, or over something else."""
    while True:
        named = one.filename == other.filename
        plain = not (one.filename.startswith(PREFIX) or other.filename.startswith(PREFIX))
        if one.driver != other.driver or one.size != other.size or files.key(one) != files.key(other):
            return False
        if not (named or (plain and files.key(one) is not None)):
            return False
        below, beneath = one.backing, other.backing
        if below is None or beneath is None:
            return below is beneath
        one, other = skip_filters(below.node), skip_filters(beneath.node)


def candidates(top: Disk, below: Disk | None, unit: int) -> Iterator[Run]:
    """Yield runs of whole units that *top* does not store itself and that may read otherwise over *below* (None: over nothing)."""
    return plan.joined(plan.rounded(_rows(top, below), unit, top.size))


def _rows(top: Disk, below: Disk | None) -> Iterator[Run]:
    files = Files()
    shared = shared_from(top, below, files)
    others = _extents(below)
    other = next(others, None)
    for batch in top.extents():
        for row in batch:
            position = row.start
            while position < row.end:
                while other is not None and other.end <= position:
                    other = next(others, None)
                end = row.end if other is None else min(row.end, other.end)
                same = _same(row, other, position, shared, files)
                yield Run(position, end - position, plan.SKIP if same else plan.DATA)
                position = end


def _extents(disk: Disk | None) -> Iterator[Extent]:
    if disk is not None:
        for batch in disk.extents():
            yield from batch


def _same(row: Extent, other: Extent | None, position: int, shared: int | None, files: Files) -> bool:
    """Tell whether what begins at *position* reads alike for sure, or is stored by the top itself."""
    if row.depth == 0 and row.flags & ALLOCATED:
        return True
    if other is None or other.flags & ZERO:
        return bool(row.flags & ZERO)
    if shared is not None and row.depth >= shared:
        return True
    return same_place(row, other, files)


def same_place(row: Extent, other: Extent, files: Files) -> bool:
    """Tell whether both lie, plainly, at the same place of the same file where they overlap."""
    return (
        row.flags & _PLACED_MASK == _PLACED
        and other.flags & _PLACED_MASK == _PLACED
        and row.host - row.start == other.host - other.start
        and files.key(row.node) is not None
        and files.key(row.node) == files.key(other.node)
    )


class _Changes(Sink):
    """Lets pass what reads otherwise in *below*; what has become zero is written as such at once."""

    below: Disk | None = None
    as_bytes = 0  #: before this offset what has become zero is written like everything else
    copied = 0
    zeroes = 0
    joins = False

    def begin(self, below: Disk | None) -> None:
        """Learn what the pieces are compared with."""
        self.below = below
        self._local = threading.local()
        self._lock = threading.Lock()

    def parts_of(self, offset: int, buffer: bytearray, length: int) -> Parts:
        parts: Parts = []
        with memoryview(buffer) as view, self._other(offset, length) as other:
            if view[:length] == other:
                return []
            grain = max(self.part, SECTOR)
            for begin in range(0, length, grain):
                end = min(begin + grain, length)
                if view[begin:end] == other[begin:end]:
                    continue
                if offset + begin >= self.as_bytes and is_zero(view[begin:end]):
                    self.zero(offset + begin, end - begin)
                    self._count(0, end - begin)
                elif parts and parts[-1][1] == begin:
                    parts[-1] = (parts[-1][0], end)
                else:
                    parts.append((begin, end))
        self._count(sum(end - begin for begin, end in parts), 0)
        return parts

    def zero(self, offset: int, length: int) -> None:
        self.disk.write_zeroes(offset, length)

    def _count(self, copied: int, zeroes: int) -> None:
        with self._lock:
            self.copied += copied
            self.zeroes += zeroes

    def _other(self, offset: int, length: int) -> memoryview:
        if not hasattr(self._local, "buffer") or len(self._local.buffer) < length:
            self._local.buffer = bytearray(length)
        view = memoryview(self._local.buffer)[:length]
        inside = 0
        if self.below is not None:
            inside = max(0, min(length, self.below.size - offset))
            if inside:
                self.below.read_into(offset, view[:inside])
        fill_zero(view[inside:])
        return view


class _LaneChanges(_Changes, LaneSink):
    pass


class _CompressedChanges(_Changes, CompressedSink):
    pass


class LookSink(_Changes):
    """Counts what would be written, and writes nothing."""

    def zero(self, offset: int, length: int) -> None:
        """Do nothing."""

    def place(
        self, offset: int, buffer: bytearray, length: int, prepared: object, gaps: Sequence[tuple[int, int]] = ()
    ) -> Parts:
        return []


def changes_sink(
    top: Disk, below: Disk | None, *, compressed: bool = False, look: bool = False, as_bytes: bool = False
) -> _Changes:
    """Return the sink that writes into *top* what differs from *below*, and counts it; with *look* it only counts.

    *as_bytes* stores what has become zero as data, not as zeroes that the format knows of, as far as the old backing file reaches.
    """
    sink: _Changes
    node = lane_of(top)
    # It reads as zero: what lies between the parts must be left as it is.
    if look:
        sink = LookSink(top, sparse=0, reads_zero=True)
    elif compressed:
        root = top.root
        if not isinstance(root, FormatNode) or not hasattr(root, "codec"):
            raise NotSupported("Compression not supported for this file format", path=top.filename)
        sink = _CompressedChanges(top, root, sparse=0, reads_zero=True, codec=root.codec)
    elif node is not None:
        sink = _LaneChanges(top, node, sparse=0, reads_zero=True)
    else:
        sink = _Changes(top, sparse=0, reads_zero=True)
    sink.begin(below)
    if as_bytes:
        backing = top.root.children.get("backing")
        sink.as_bytes = 0 if backing is None else backing.node.size
    return sink

"""The filter "copy-on-read": what is read from below the top image is written into it, so that it need not be read there again.

Source: QEMU's ``BlockdevOptionsCor`` and the description of ``copy-on-read`` in its manual: whole clusters are copied; zeroes are kept as zeroes;
with "bottom" nothing is copied that lies below that node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.access.range_locks import RangeLocks
from cowhand.block.filters.base import FilterNode, PassingFilter
from cowhand.block.graph.block_status import layered, skip_filters
from cowhand.block.node.node import CONSISTENT_READ, WRITE_UNCHANGED, BlockNode, Child, Zeroing
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import Buffer, is_zero
from cowhand.core.errors import InvalidArgument
from cowhand.core.extents import ALLOCATED, ZERO

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening

#: Bytes that are copied at once, and kept as zeroes where they are: a cluster, or this where clusters are smaller.
_PIECE = 1 << 16
#: The same of what is known to be zeroes below: nothing is read of it.
_ZERO_PIECE = 64 << 20


class CopyOnReadOptions(NodeOptions):
    """Options of the filter."""

    bottom: str | None = option(help="node below which nothing is copied")


class CopyOnReadNode(PassingFilter):
    """Copies while it reads. A copy and a write never overlap in time, so no copy undoes a write."""

    driver: ClassVar[str] = "copy-on-read"
    options_class: ClassVar[type[NodeOptions]] = CopyOnReadOptions
    options: CopyOnReadOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self._ranges = RangeLocks()

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> FilterNode:
        node = super().open(opening, options, given)
        if not node.writable:
            raise node.refuse_read_only()
        assert isinstance(node, CopyOnReadNode)
        opening.afterwards(node.check_bottom)
        return node

    def check_bottom(self) -> None:
        """Raise InvalidArgument where the bottom node is not in the chain."""
        self._depth(skip_filters(self.below.node))

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        return perm | (WRITE_UNCHANGED if perm & CONSISTENT_READ else 0), shared

    # -- copying

    def _depth(self, top: BlockNode) -> int | None:
        """Return how many layers there are from *top* to the bottom one, or None for all. Raises InvalidArgument where that is not in the chain."""
        wanted = self.options.bottom
        if wanted is None:
            return None
        depth, node = 1, top
        while node.name != wanted:
            below = node.backing
            if below is None:
                raise InvalidArgument(f"Bottom node '{wanted}' not found")
            node = skip_filters(below.node)
            depth += 1
        return depth

    def _missing(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (begin, end, whether it is known to be zeroes) of what the top image does not hold and is to be copied."""
        top = skip_filters(self.below.node)
        depth = self._depth(top)
        end = offset + length
        while offset < end:
            batch = layered(top, offset, end - offset, depth)
            for row in batch:
                held = row.flags & ALLOCATED and row.depth == 0
                if not held and (depth is None or row.flags & ALLOCATED):
                    yield row.start, min(row.end, end), bool(row.flags & ZERO)
            offset = batch.end

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self.populate(offset, len(buffer))
        self.below.read_into(offset, buffer)

    def missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return (offset, length) of what is still to be copied of a range."""
        return [(begin, end - begin) for begin, end, _ in self._missing(offset, length)]

    def populate(self, offset: int, length: int) -> int:
        """Copy what the top image does not hold of a range, in whole clusters; return how many bytes that were."""
        missing = list(self._missing(offset, length)) if self.writable and length else []
        unit = getattr(skip_filters(self.below.node), "allocation_unit", 1)
        done = 0
        for begin, end, zeroes in missing:
            begin, end = max(done, begin // unit * unit), min(self.size, -(-end // unit) * unit)
            step = max(_ZERO_PIECE if zeroes else _PIECE, unit)
            for start in range(begin, end, step):
                self._copy(start, min(step, end - start))
            done = max(done, end)
        return sum(end - begin for begin, end, _ in missing)

    def _copy(self, offset: int, length: int) -> None:
        with self._ranges.hold(offset, length):
            # Looked at again: somebody may have written, or copied, meanwhile.
            native = self.below.node.capabilities.zeroes is Zeroing.NATIVE
            for begin, end, zeroes in list(self._missing(offset, length)):
                if zeroes and native:
                    self.below.write_zeroes(begin, end - begin)
                    continue
                data = bytearray(end - begin)
                self.below.read_into(begin, data)
                if native and is_zero(data):
                    self.below.write_zeroes(begin, len(data))
                else:
                    self.below.write(begin, (data,))

    # -- requests

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        with self._ranges.hold(offset, sum(len(buffer) for buffer in buffers)):
            self.below.write(offset, buffers, fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        with self._ranges.hold(offset, length):
            self.below.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        with self._ranges.hold(offset, length):
            self.below.discard(offset, length)

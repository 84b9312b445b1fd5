"""From extents to a picture's cells: how many bytes of each kind lie in each of so many equal parts of a disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, ZERO, Extent, ExtentBatch


class Kind(NamedTuple):
    """What stretches of a disk look alike in a picture: "data" and "compressed" of one layer, "zero", "unallocated"."""

    what: str
    depth: int = 0


ZEROES = Kind("zero")
NOTHING = Kind("unallocated")


def kind_of(flags: int, depth: int) -> Kind:
    """Return the kind of an extent with *flags* in the layer at *depth*."""
    if flags & ZERO:
        return ZEROES if flags & ALLOCATED else NOTHING
    if flags & DATA:
        return Kind("compressed" if flags & COMPRESSED else "data", depth)
    return NOTHING


class Raster:
    """A disk of *size* bytes cut into *cells* equal parts (to a byte); counts bytes of each kind in each.

    Cell *i* is ``[i * size // cells, (i + 1) * size // cells)``. Cost: one step for each extent and for each cell that it touches.
    """

    def __init__(self, size: int, cells: int) -> None:
        self.size = size
        self.cells: list[dict[Kind, int]] = [{} for _ in range(max(1, cells))]
        self.totals: dict[Kind, int] = {}

    def begin_of(self, cell: int) -> int:
        """Return the first byte of *cell*."""
        return cell * self.size // len(self.cells)

    def add(self, start: int, length: int, kind: Kind) -> None:
        """Count *length* bytes at *start*; what lies behind the end of the disk is left out."""
        end = min(start + length, self.size)
        if start >= end:
            return
        self.totals[kind] = self.totals.get(kind, 0) + end - start
        count = len(self.cells)
        # The formula of begin_of, turned round; floor division may point one cell too low.
        cell = start * count // self.size
        while self.begin_of(cell + 1) <= start:
            cell += 1
        while start < end:
            border = min(self.begin_of(cell + 1), end)
            held = self.cells[cell]
            held[kind] = held.get(kind, 0) + border - start
            start = border
            cell += 1

    def add_batches(self, batches: Iterable[ExtentBatch]) -> Raster:
        """Count everything in *batches*; returns the raster."""
        for batch in batches:
            for start, length, flags, depth in zip(batch.start, batch.length, batch.flags, batch.depth, strict=True):
                self.add(start, length, kind_of(flags, depth))
        return self

    def add_extents(self, extents: Iterable[Extent]) -> Raster:
        """Count everything in *extents*; returns the raster."""
        for row in extents:
            self.add(row.start, row.length, kind_of(row.flags, row.depth))
        return self


def in_order(kinds: Iterable[Kind]) -> list[Kind]:
    """Return *kinds* as legends and stacks show them: the active layer's data first, then deeper ones, zeroes, nothing."""
    rank = {"data": 0, "compressed": 1, "zero": 2, "unallocated": 3}
    return sorted(kinds, key=lambda kind: (rank[kind.what] >= 2, kind.depth, rank[kind.what]))

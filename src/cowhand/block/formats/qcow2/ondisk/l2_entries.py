"""Tables of 64-bit entries as runs of equal ones: a hostile table may have one entry, millions of times (QEMU ``docs/interop/qcow2``)."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from cowhand.block.formats.qcow2.ondisk import layout as L

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode


#: What the entries of a run are: bits of a kind, PACKED (compressed) alone; and what that means: flags of an extent, and the node of its bytes.
ZEROES, PLACED, PACKED = L.ENTRY_ZERO, 2, 4
Meanings: TypeAlias = "dict[int, tuple[int, BlockNode | None]]"

_LITTLE = sys.byteorder == "little"
#: Entries from which numpy, which takes 100 ms to import, finds runs faster.
_MANY = 1 << 17
#: Entries that numpy looks at together: bounds what becomes Python numbers at once.
_PIECE = 1 << 15


def words_of(data: bytes | bytearray | memoryview) -> array[int]:
    """Return the big-endian 64-bit numbers of *data*."""
    words = array("Q")
    words.frombytes(data)
    if _LITTLE:
        words.byteswap()
    return words


def runs_of(words: array[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first index, entry, how many equal ones) of *words*, without those that are zero. A long run may come in several."""
    if len(words) < _MANY:
        begin, count = 0, len(words)
        while begin < count:
            entry = words[begin]
            end = begin + 1
            while end < count and words[end] == entry:
                end += 1
            if entry:
                yield begin, entry, end - begin
            begin = end
        return
    import numpy

    column = numpy.frombuffer(words, "u8")
    for first in range(0, len(column), _PIECE):
        piece = column[first : first + _PIECE]
        if not piece.any():
            continue
        starts = numpy.flatnonzero(numpy.append(True, piece[1:] != piece[:-1]))
        lengths = numpy.diff(numpy.append(starts, len(piece)))
        for start, entry, length in zip(starts.tolist(), piece[starts].tolist(), lengths.tolist(), strict=True):
            if entry:
                yield first + start, entry, length


def adjoining(words: array[int], position: int, size: int, stride: int = 1) -> int:
    """Return how many entries from *position* on, every *stride*-th word, name clusters of *size* bytes one behind the other, flags equal."""
    value, count, run, stretch = words[position], (len(words) - position + stride - 1) // stride, 1, 4
    while run < count:
        # Compare ever longer stretches at once: a whole table in ten comparisons.
        take = min(stretch, count - run)
        begin = position + run * stride
        wanted = value + run * size
        if words[begin : begin + take * stride : stride] == array("Q", range(wanted, wanted + take * size, size)):
            run += take
            stretch *= 4
        elif take > 1:
            stretch = 1
        else:
            break
    return run

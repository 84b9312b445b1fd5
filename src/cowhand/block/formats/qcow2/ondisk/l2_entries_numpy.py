"""Finding the runs of an L2 table with numpy: for images of many runs, where importing it pays.

A run is what :func:`cowhand.block.formats.qcow2.cluster.mapping.Mapping.batch` merges into one row: entries of one kind whose host offsets rise by
one cluster, or that name no place.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import numpy as np

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import PACKED, PLACED, ZEROES
from cowhand.core.extents import MAX_ROWS, NO_HOST, OFFSET, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.ondisk.l2_entries import Meanings

_PLACE = np.uint64(L.L2_OFFSET_MASK)
_COMPRESSED = np.uint64(L.ENTRY_COMPRESSED)
_ZERO = np.uint64(L.ENTRY_ZERO)
#: (first byte, counted from the first entry; what; host offset) of each run, as columns
Runs = tuple[Any, Any, Any]


def runs(entries: array[int], size: int, bad: int) -> Runs | None:
    """Return the runs of *entries* (native integers); a compressed entry's place is not looked at. None when an entry cannot be followed.

    *size*: of a cluster; *bad*: bits that an entry with a place must not have. The last run ends with the table.
    """
    values = np.frombuffer(entries, dtype=np.uint64)
    packed = (values & _COMPRESSED) != 0
    places = np.where(packed, np.uint64(0), values & _PLACE)
    placed = places != 0
    if (values[placed] & np.uint64(bad)).any():
        return None
    kinds = np.where(packed, PACKED, (values & _ZERO != 0) * ZEROES + placed * PLACED).astype(np.uint8)
    # A run goes on while the kind stays and the place rises by a cluster, or while there is no place on either side.
    rising = places[1:] == places[:-1] + np.uint64(size)
    goes_on = (kinds[1:] == kinds[:-1]) & (rising | ~placed[1:])
    heads = np.concatenate(([0], np.flatnonzero(~goes_on) + 1))
    return heads.astype(np.uint64) * np.uint64(size), kinds[heads], places[heads]


def add_rows(out: ExtentBatch, found: Runs, meanings: Meanings, base: int, offset: int, stop: int) -> int:
    """Do with *found* what :func:`cowhand.block.formats.qcow2.cluster.mapping.add_rows` does with lists."""
    starts, kinds, hosts = found
    starts = starts + np.uint64(base)
    low = int(np.searchsorted(starts, offset, "right")) - 1
    high = min(int(np.searchsorted(starts, stop, "left")), low + MAX_ROWS - len(out))
    if low >= high:
        return offset
    end = stop if high == len(starts) else min(stop, int(starts[high]))
    starts, kinds, hosts = starts[low:high].copy(), kinds[low:high], hosts[low:high].copy()
    cut = np.uint64(max(0, offset - int(starts[0])))
    starts[0] += cut
    hosts[0] += cut
    flags_of, nodes_of = np.zeros(256, np.uint16), np.zeros(256, np.uint16)
    for what in np.unique(kinds).tolist():
        flags_of[what], nodes_of[what] = meanings[what][0], out.index_of(meanings[what][1])
    flags = flags_of[kinds]
    hosts = np.where(flags & OFFSET != 0, hosts, np.uint64(NO_HOST))
    lengths = np.diff(starts, append=np.uint64(end))
    columns = (("Q", starts), ("Q", lengths), ("H", flags), ("Q", hosts), ("H", nodes_of[kinds]))
    out.extend(*(array(code, column.tobytes()) for code, column in columns))
    return end

"""Finding the runs of an L2 table with numpy: for images of hundreds of tables, where importing it pays.

A run is what :func:`cowhand.block.formats.qcow2.mapping.Mapping.batch` merges into one row: entries of one kind whose host offsets rise by
one cluster, or that name no place.
"""

from __future__ import annotations

from array import array

import numpy as np

from cowhand.block.formats.qcow2 import layout as L

_KIND = np.uint64(L.ENTRY_COMPRESSED | L.ENTRY_ZERO)
_PLACE = np.uint64(L.L2_OFFSET_MASK)
_COMPRESSED = np.uint64(L.ENTRY_COMPRESSED)


def ends_of_runs(entries: array[int], step: int) -> list[int]:
    """Return the index after each run of *entries* (native integers); a compressed entry's place is not looked at. *step*: cluster size."""
    values = np.frombuffer(entries, dtype=np.uint64)
    kinds = values & _KIND
    places = np.where(kinds & _COMPRESSED, np.uint64(0), values & _PLACE)
    # A run goes on while the kind stays and the place rises by a cluster, or while there is no place on either side.
    rising = places[1:] == places[:-1] + np.uint64(step)
    placeless = (places[1:] == 0) & (places[:-1] == 0)
    compressed = (kinds[1:] & kinds[:-1] & _COMPRESSED).astype(bool)
    goes_on = ((kinds[1:] == kinds[:-1]) & (placeless | (rising & (places[:-1] != 0)))) | compressed
    return [*(np.flatnonzero(~goes_on) + 1).tolist(), len(entries)]

"""Finding the runs of a table of extended L2 entries with numpy (QEMU ``docs/interop/qcow2``, "Extended L2 Entries"): for images of many tables.

What :meth:`cowhand.block.formats.qcow2.cluster.extended_mapping.ExtendedMapping.batch` does entry by entry otherwise, with the same rows.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from cowhand.block.formats.qcow2.ondisk import layout as L

_PLACE = np.uint64(L.L2_OFFSET_MASK)
_COMPRESSED = np.uint64(L.ENTRY_COMPRESSED)
_HALF = np.uint64(32)
_ONE = np.uint64(1)
_DATA_BITS = np.uint64(0xFFFFFFFF)
COUNT = 32
#: what a run is: the kind of its subclusters, in a cluster that has a place or not, or compressed clusters
NOTHING, DATA, ZERO, PLACED, PACKED = 0, 1, 2, 4, 8


def runs(words: array[int], size: int, bad: int) -> tuple[Any, Any, Any] | None:
    """Return (first byte, what, host offset) of each run of *words*, entries and bitmaps as native integers, the bytes counted from the first entry.

    *size*: of a cluster; *bad*: bits that an entry must not have. The last run ends with the table. None when an entry cannot be followed.
    """
    pairs = np.frombuffer(words, dtype=np.uint64)
    entries, bitmaps = pairs[::2], pairs[1::2]
    packed = (entries & _COMPRESSED) != 0
    places = entries & _PLACE
    zeroes = bitmaps >> _HALF
    nowhere = places == 0
    wrong = np.where(nowhere, bitmaps & _DATA_BITS, (bitmaps & zeroes) | (entries & np.uint64(bad)))
    if (wrong[~packed] if packed.any() else wrong).any():
        return None
    alike = (bitmaps == 0) | (bitmaps == _DATA_BITS) | (bitmaps == ~_DATA_BITS) | packed
    if alike.all():
        starts = np.arange(0, len(entries) * size, size, dtype=np.uint64)
        lengths: Any = np.uint64(size)
    else:
        # A cluster of one kind is one piece, any other as many as it has subclusters.
        pieces = np.where(alike, 1, COUNT)
        owner = np.repeat(np.arange(len(entries)), pieces)
        number = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)).astype(np.uint64)
        bitmaps, zeroes, packed, nowhere = (
            bitmaps[owner] >> number,
            zeroes[owner] >> number,
            packed[owner],
            nowhere[owner],
        )
        within = number * np.uint64(size // COUNT)
        starts = owner.astype(np.uint64) * np.uint64(size) + within
        places = places[owner] + within
        lengths = np.where(alike[owner], np.uint64(size), np.uint64(size // COUNT))[:-1]
    kinds = (bitmaps & _ONE) * np.uint64(DATA) + (zeroes & _ONE) * np.uint64(ZERO)
    kinds = np.where(packed, np.uint64(PACKED), kinds + np.where(nowhere, np.uint64(0), np.uint64(PLACED)))
    goes_on = (kinds[1:] == kinds[:-1]) & (
        ((kinds[1:] & np.uint64(PLACED)) == 0) | (places[1:] == places[:-1] + lengths)
    )
    heads = np.concatenate(([0], np.flatnonzero(~goes_on) + 1))
    return starts[heads], kinds[heads], places[heads]

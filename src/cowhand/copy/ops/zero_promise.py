"""Whether a target reads as zeroes, as its user promises: what can be found out at little cost is.

A new image does by itself, unless what was never written reads as something else (LUKS). Of an existing one the extents are looked at, and
pieces of what they call data are read: not all of it, which would cost what the promise is to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from cowhand.core.buffers import is_zero
from cowhand.core.extents import DATA, ZERO

if TYPE_CHECKING:
    from cowhand.block.disk import Disk

#: Rows of extents that are looked at, pieces that are read of them all, and bytes of a piece.
_ROWS = 4096
_PIECES = 512
_PIECE = 64 << 10


def broken_promise(disk: Disk) -> str | None:
    """Return why *disk* does not read as zeroes, None where nothing says so. Raises IOFailed where it cannot be read."""
    if not disk.root.zero_when_new:
        return "what was never written of it does not read as zeroes"
    rows = list(islice(_data(disk), _ROWS))
    if not rows:
        return None
    each = max(1, _PIECES // len(rows))
    for start, length in rows[:: max(1, len(rows) // _PIECES)]:
        step = max(_PIECE, length // each)
        for offset in range(start, start + length, step):
            piece = disk.read(offset, min(_PIECE, start + length - offset))
            if not is_zero(piece):
                return f"it holds data at {offset:#x}"
    return None


def _data(disk: Disk) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of what does not read as zeroes by its extents alone."""
    for batch in disk.extents():
        for row in batch:
            if row.flags & DATA and not row.flags & ZERO:
                yield row.start, row.length

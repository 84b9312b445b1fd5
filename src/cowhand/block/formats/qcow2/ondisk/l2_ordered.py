"""Tables whose entries rise by a cluster each, compared as bytes: what a freshly filled or preallocated image consists of, read without numpy.

Such a table is a piece of an endless one. Of that, stretches as long as a table are made by setting the upper bytes of all entries at once.
"""

from __future__ import annotations

from functools import cache

from cowhand.block.formats.qcow2.ondisk import layout as L

#: Kinds of entries (flags, and bitmaps of subclusters) for which a pattern is made; it costs as much as reading some tables in another way.
_MOST_PATTERNS = 8


@cache
def _with(value: int) -> bytes:
    """Return what sets the bits of *value* in every byte (see :meth:`bytes.translate`)."""
    return bytes(byte | value for byte in range(256))


class OrderedTables:
    """Tells tables in order from others, in an image of clusters of ``2**cluster_bits`` bytes. Not thread-safe.

    *stride* is the number of 64-bit words of an entry.
    """

    def __init__(self, cluster_bits: int, stride: int) -> None:
        self._bits = cluster_bits
        self._width = 8 * stride
        self._entries = (1 << cluster_bits) // self._width
        self._reach_bits = cluster_bits + self._entries.bit_length() - 1
        self._pattern = b""
        self._rest = b""
        self._patterns = 0
        self._made: dict[int, bytes] = {}

    def matches(self, table: bytes) -> bool:
        """Tell whether each entry is the one before it plus a cluster, with the same flags, and the same bitmap of subclusters if it has one."""
        first: int = L.U64.unpack_from(table)[0]
        rest = table[8 : self._width] + L.U64.pack(first & ~L.L2_OFFSET_MASK)
        if rest != self._rest or not self._pattern:
            if self._patterns == _MOST_PATTERNS:
                return False
            self._begin(rest)
        host = first & L.L2_OFFSET_MASK
        number = host >> self._reach_bits
        at = (host >> self._bits & (self._entries - 1)) * self._width
        if not table.startswith(self._stretch(number)[at:]):
            return False
        return not at or table.endswith(self._stretch(number + 1)[:at])

    def _begin(self, rest: bytes) -> None:
        self._patterns += 1
        self._rest = rest
        flags = int.from_bytes(rest[-8:], "big")
        self._pattern = b"".join([L.U64.pack(flags | i << self._bits) + rest[:-8] for i in range(self._entries)])
        self._made = {}

    def _stretch(self, number: int) -> bytes:
        """Return the table of the clusters that begin *number* times the reach of a table into the file."""
        found = self._made.get(number)
        if found is None:
            out = bytearray(self._pattern)
            for index, value in enumerate((number << self._reach_bits & L.L2_OFFSET_MASK).to_bytes(8, "big")):
                if value:
                    column = self._pattern[index :: self._width]
                    out[index :: self._width] = column.translate(_with(value))
            found = bytes(out)
            if len(self._made) > 1:
                self._made.pop(next(iter(self._made)))
            self._made[number] = found
        return found

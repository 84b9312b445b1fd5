"""The coding of reference counts in a refcount block (QEMU ``docs/interop/qcow2``, "Refcount block entry"). No I/O.

Widths are 1, 2, 4, 8, 16, 32 or 64 bits, big-endian; narrower than a byte, the lowest bits come first.
"""

from __future__ import annotations


class Counts:
    """Reads and writes counts of ``2**order`` bits in a block's bytes. Without state of its own, so thread-safe."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.bits = 1 << order
        self.width = self.bits // 8  #: bytes for each count; 0 when several share a byte
        self.maximum = (1 << self.bits) - 1
        if order == 6:
            # Signed in the specification's own reference: counts never get there.
            self.maximum = (1 << 63) - 1
        if self.width == 0:
            per = 8 // self.bits
            mask = self.maximum
            has_zero = [any(not (byte >> (self.bits * i)) & mask for i in range(per)) for byte in range(256)]
            self._has_zero = bytes(has_zero)

    def get(self, data: bytes | bytearray, index: int) -> int:
        """Return count number *index*."""
        width = self.width
        if width == 2:
            at = index * 2
            return data[at] << 8 | data[at + 1]
        if width:
            return int.from_bytes(data[index * width : index * width + width], "big")
        per = 8 // self.bits
        return (data[index // per] >> (index % per * self.bits)) & self.maximum

    def _put(self, data: bytearray, index: int, value: int) -> None:
        width = self.width
        if width:
            data[index * width : index * width + width] = value.to_bytes(width, "big")
            return
        per = 8 // self.bits
        shift = index % per * self.bits
        data[index // per] = data[index // per] & ~(self.maximum << shift) & 0xFF | value << shift

    def span(self, index: int, count: int) -> tuple[int, int]:
        """Return the bytes [start, end) that hold *count* counts from *index* on."""
        return index * self.bits // 8, -(-(index + count) * self.bits // 8)

    def fill(self, data: bytearray, index: int, count: int, value: int) -> tuple[int, int]:
        """Set *count* counts to *value*; return the bytes touched."""
        width = self.width
        if width:
            data[index * width : (index + count) * width] = value.to_bytes(width, "big") * count
            return self.span(index, count)
        per = 8 // self.bits
        end = index + count
        first_whole = min(end, -(-index // per) * per)
        last_whole = max(first_whole, end - end % per)
        for single in (*range(index, first_whole), *range(last_whole, end)):
            self._put(data, single, value)
        whole = sum(value << (self.bits * i) for i in range(per))
        data[first_whole // per : last_whole // per] = bytes([whole]) * ((last_whole - first_whole) // per)
        return self.span(index, count)

    def store(self, data: bytearray, index: int, values: list[int]) -> tuple[int, int]:
        """Set counts from *index* on to *values*; return the bytes touched."""
        for offset, value in enumerate(values):
            self._put(data, index + offset, value)
        return self.span(index, len(values))

    def uniform(self, data: bytes | bytearray, index: int, count: int) -> int | None:
        """Return the value that *count* counts from *index* on share, or None."""
        first = self.get(data, index)
        if count == 1:
            return first
        width = self.width
        if width:
            same = data[index * width : (index + count) * width] == first.to_bytes(width, "big") * count
            return first if same else None
        return first if all(self.get(data, index + i) == first for i in range(1, count)) else None

    def zero_run(self, data: bytes | bytearray, index: int, limit: int) -> int:
        """Return how many of the *limit* counts from *index* on are zero before the first other."""
        width = self.width
        if width:
            piece = bytes(data[index * width : (index + limit) * width])
            return (len(piece) - len(piece.lstrip(b"\0"))) // width
        run = 0
        while run < limit and not self.get(data, index + run):
            run += 1
        return run

    def next_zero(self, data: bytes | bytearray, index: int, limit: int) -> int:
        """Return the number of the first zero count in [index, limit), or *limit*."""
        width = self.width
        if width:
            zero = bytes(width)
            at = index * width
            while True:
                at = data.find(zero, at)
                if at < 0:
                    return limit
                if at % width == 0:
                    return min(at // width, limit)
                at += 1
        per = 8 // self.bits
        while index < limit:
            if index % per == 0:
                at = data.translate(self._has_zero).find(1, index // per)
                if at < 0:
                    return limit
                index = at * per
            if not self.get(data, index):
                return index
            index += 1
        return limit

    def zeros(self, data: bytes | bytearray, index: int, count: int) -> int:
        """Return how many of the *count* counts from *index* on are zero."""
        found, end = 0, index + count
        while index < end:
            run = self.zero_run(data, index, end - index)
            found += run
            index += run
            if index < end:
                used = self.next_zero(data, index, end)
                index = used
        return found

    def last_used(self, data: bytes | bytearray, end: int) -> int:
        """Return the number of the last count before *end* that is not zero, or -1."""
        while end > 0:
            used = len(data[: -(-end * self.bits // 8)].rstrip(b"\0"))
            index = min(end, -(-used * 8 // self.bits)) - 1
            while index >= 0 and index * self.bits // 8 >= used - 1 and not self.get(data, index):
                index -= 1
            if index < 0 or self.get(data, index):
                return index
            end = index + 1
        return -1

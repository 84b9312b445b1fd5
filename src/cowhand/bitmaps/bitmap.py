"""A bitmap over a disk: one bit for each granule, in pages that exist only where something is set.

The form on disk and on the wire is the one that QEMU's formats and migration streams share: bit *n* is bit ``n % 8`` of byte ``n // 8``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

from cowhand.core.errors import InvalidArgument
from cowhand.core.locks import RANK_LEAF, ranked_lock

PAGE_BYTES = 4096
_PAGE_SHIFT = 15  #: bits of a page, as a power of two
_PAGE_BITS = 1 << _PAGE_SHIFT
_BYTE_MASK = PAGE_BYTES - 1
_BIT_MASK = _PAGE_BITS - 1
_ONES = b"\xff" * PAGE_BYTES  #: the page of a range that is set wholly; never changed, so all bitmaps share it
_ZEROES = bytes(PAGE_BYTES)
#: Granules, the first ones of a disk, for which a hook keeps a byte each: what it has not touched of these costs no memory.
MAX_SEEN = 1 << 24
_SEEN_STEP = 1 << 20

#: Granularities that make sense: a sector to 2 GiB (QEMU's limits as well).
MIN_GRANULARITY = 512
MAX_GRANULARITY = 1 << 31

_Page: TypeAlias = "bytearray | bytes"


class Bitmap:
    """Which granules of a disk of ``size`` bytes are dirty.

    Thread-safe: :meth:`mark` may be called by any number of threads at once; :meth:`marker` takes no lock where it has set the bit before. A bit
    that is cleared while another thread sets it ends up in either state. Iteration sees each page at one moment, not the whole at one.
    """

    __slots__ = ("_lock", "_pages", "_seen", "_shift", "bits", "size")

    def __init__(self, size: int, granularity: int) -> None:
        if granularity & (granularity - 1) or not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY:
            raise InvalidArgument(
                f"a granularity of {granularity} bytes is not possible",
                qemu="Granularity must be power of 2 and at least 512",
                hint="A power of two from 512 bytes to 2 GiB.",
            )
        self._shift = granularity.bit_length() - 1
        self.size = size
        self.bits = -(-size >> self._shift)
        self._pages: dict[int, _Page] = {}
        #: Not zero for granules that are known to be set, whatever is unknown: one look-up for the hook. Changed with the lock held.
        self._seen = bytearray()
        self._lock = ranked_lock(RANK_LEAF, "dirty bitmap")

    @property
    def granularity(self) -> int:
        """Bytes of the disk that one bit stands for."""
        return 1 << self._shift

    @property
    def nbytes(self) -> int:
        """Length of the whole bitmap in its serialised form."""
        return -(-self.bits // 8)

    # -- setting and clearing

    def mark(self, offset: int, length: int) -> None:
        """Set every bit of which ``[offset, offset + length)`` touches the granule. It never blocks for long."""
        if length > 0:
            first, end = offset >> self._shift, (offset + length - 1 >> self._shift) + 1
            with self._lock:
                end = min(end, self.bits)
                self._set(first, end)
                if first < end <= len(self._seen) and end - first <= PAGE_BYTES:
                    self._seen[first:end] = _ONES[: end - first]

    def marker(self) -> Callable[[int, int], None]:
        """Return :meth:`mark` as an after-write hook: a function, since every small write calls it, and most find their bit set already."""
        with self._lock:
            if not self._seen:
                self._seen = bytearray(min(self.bits, MAX_SEEN))
        shift, seen, slow, clean = self._shift, self._seen, self.mark, self._seen.find

        def mark(offset: int, length: int) -> None:
            # As few operations as can be on large numbers, which the interpreter is slow with.
            first = offset >> shift
            try:
                if seen[first]:
                    last = (offset + length - 1) >> shift
                    if last == first or (seen[last] and clean(0, first, last) < 0):
                        return
            except IndexError:
                pass  # behind what has a byte
            slow(offset, length)

        return mark

    def clear(self, offset: int = 0, length: int | None = None) -> None:
        """Clear every bit whose granule lies wholly in ``[offset, offset + length)``; all bits by default.

        The last granule of a disk ends with the disk.
        """
        end = self.size if length is None else min(self.size, offset + length)
        begin = -(-offset >> self._shift)
        last = self.bits if end == self.size else end >> self._shift
        with self._lock:
            self._forget_seen(begin, last)
            if not begin and last == self.bits:
                self._pages.clear()
            elif begin < last:
                self._clear(begin, last)

    def merge(self, other: Bitmap) -> None:
        """Set what is set in *other*, whatever its granularity: every granule that a dirty one of *other* touches."""
        if other._shift != self._shift:
            for offset, length in other.extents():
                self.mark(offset, length)
            return
        for index, page in list(other._pages.items()):
            self.set_bytes(index * PAGE_BYTES, page)

    def resize(self, size: int) -> None:
        """Follow the disk to a new size: what is new is clean, what is cut off is forgotten."""
        with self._lock:
            bits = -(-size >> self._shift)
            if bits < self.bits:
                self._clear(bits, -(-self.bits // _PAGE_BITS) * _PAGE_BITS)
                del self._seen[bits:]
            elif self._seen:
                self._seen.extend(bytes(max(0, min(bits, MAX_SEEN) - len(self._seen))))
            self.size, self.bits = size, bits

    def _forget_seen(self, begin: int, end: int) -> None:
        """Have the hook look again at granules ``[begin, end)``, before they change (lock held)."""
        seen = self._seen
        for at in range(begin, min(end, len(seen)), _SEEN_STEP):
            stop = min(at + _SEEN_STEP, end, len(seen))
            if seen.find(0xFF, at, stop) >= 0:
                seen[at:stop] = bytes(stop - at)

    def _set(self, begin: int, end: int) -> None:
        while begin < end:
            index, first = begin >> _PAGE_SHIFT, begin & _BIT_MASK
            last = min(_PAGE_BITS, first + end - begin)
            if last - first == _PAGE_BITS:
                self._pages[index] = _ONES
            else:
                page = self._pages.get(index)
                if page is None:
                    page = self._pages[index] = bytearray(PAGE_BYTES)
                if isinstance(page, bytearray):
                    _fill(page, first, last)
            begin += last - first

    def _clear(self, begin: int, end: int) -> None:
        for index in self._between(begin, end):
            start = index << _PAGE_SHIFT
            first, last = max(0, begin - start), min(_PAGE_BITS, end - start)
            page = self._pages[index]
            if last - first == _PAGE_BITS:
                del self._pages[index]
                continue
            value = int.from_bytes(page, "little") & ~(((1 << last - first) - 1) << first)
            if value:
                self._pages[index] = bytearray(value.to_bytes(PAGE_BYTES, "little"))
            else:
                del self._pages[index]

    def _between(self, begin: int, end: int) -> list[int]:
        """Return, rising, the pages that hold something of bits ``[begin, end)``."""
        low, high = begin >> _PAGE_SHIFT, -(-end >> _PAGE_SHIFT)
        known = list(self._pages)
        if high - low < len(known):
            return [index for index in range(low, high) if index in self._pages]
        return sorted(index for index in known if low <= index < high)

    # -- looking

    def is_dirty(self, offset: int) -> bool:
        """Tell whether the granule that *offset* lies in is dirty."""
        bit = offset >> self._shift
        page = self._pages.get(bit >> _PAGE_SHIFT)
        return page is not None and bool(page[bit >> 3 & _BYTE_MASK] >> (bit & 7) & 1)

    def __bool__(self) -> bool:
        """Tell whether anything is dirty."""
        return any(page != _ZEROES for page in list(self._pages.values()))

    def count(self) -> int:
        """Return the number of bits that are set."""
        return sum(int.from_bytes(page, "little").bit_count() for page in list(self._pages.values()))

    def dirty_bytes(self) -> int:
        """Return how many bytes of the disk are dirty; the last granule counts as far as the disk reaches."""
        count = self.count() << self._shift
        if self.bits and self.is_dirty(self.size - 1):
            count -= (self.bits << self._shift) - self.size
        return count

    def runs(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (first bit, bit behind the last one) of each run of set bits in ``[begin, end)``, rising."""
        end = self.bits if end is None else min(end, self.bits)
        first = last = -1
        for index in self._between(begin, end):
            page = self._pages.get(index)
            if page is None:
                continue
            start = index << _PAGE_SHIFT
            for one, other in _runs(page):
                low, high = max(begin, start + one), min(end, start + other)
                if low >= high:
                    continue
                if low == last:
                    last = high
                    continue
                if last > first:
                    yield first, last
                first, last = low, high
        if last > first:
            yield first, last

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes of each dirty stretch of ``[offset, offset + length)``, rising, cut to that range and the disk."""
        stop = self.size if length is None else min(self.size, offset + length)
        if stop <= offset:
            return
        for first, last in self.runs(offset >> self._shift, -(-stop >> self._shift)):
            begin, end = max(offset, first << self._shift), min(stop, last << self._shift)
            yield begin, end - begin

    # -- the form on disk

    def get_bytes(self, first: int, length: int) -> bytes:
        """Return bytes ``[first, first + length)`` of the serialised bitmap; zeroes behind its end."""
        out = bytearray(length)
        for index in self._between(first * 8, (first + length) * 8):
            page = self._pages.get(index)
            if page is None:
                continue
            start = index * PAGE_BYTES
            low, high = max(first, start), min(first + length, start + PAGE_BYTES)
            out[low - first : high - first] = page[low - start : high - start]
        return bytes(out)

    def set_bytes(self, first: int, data: bytes | bytearray) -> None:
        """Set what is set in *data*, the serialised bitmap from byte *first* on; nothing behind the disk's end."""
        for at in range(0, len(data), PAGE_BYTES):
            self._set_piece(first + at, data[at : at + PAGE_BYTES])

    def _set_piece(self, first: int, data: bytes | bytearray) -> None:
        # At most two pages, since a piece is no longer than one.
        while data:
            index, at = divmod(first, PAGE_BYTES)
            piece, data = data[: PAGE_BYTES - at], data[PAGE_BYTES - at :]
            first += len(piece)
            value = int.from_bytes(piece, "little") << at * 8
            behind = (index + 1 << _PAGE_SHIFT) - self.bits
            if behind > 0:
                value &= (1 << max(0, _PAGE_BITS - behind)) - 1
            if not value:
                continue
            with self._lock:
                old = self._pages.get(index)
                if old is not None:
                    value |= int.from_bytes(old, "little")
                new = value.to_bytes(PAGE_BYTES, "little")
                self._pages[index] = _ONES if new == _ONES else bytearray(new)

    def sha256(self) -> str:
        """Return the hash by which QEMU's ``x-debug-block-dirty-bitmap-sha256`` compares bitmaps: of whole 64-bit words."""
        length = -(-self.bits // 64) * 8
        digest = hashlib.sha256()
        for at in range(0, length, 1 << 20):
            digest.update(self.get_bytes(at, min(1 << 20, length - at)))
        return digest.hexdigest()

    def copy(self) -> Bitmap:
        """Return a bitmap of the same size, granularity and content."""
        out = Bitmap(self.size, self.granularity)
        out.merge(self)
        return out

    def __repr__(self) -> str:
        return f"<Bitmap of {self.size} bytes by {self.granularity}, {self.count()} dirty>"


def _fill(page: bytearray, first: int, last: int) -> None:
    """Set bits ``[first, last)`` of *page*."""
    begin, end = first >> 3, last >> 3
    if begin == end:
        page[begin] |= ((1 << last - first) - 1) << (first & 7)
        return
    if first & 7:
        page[begin] |= 0xFF << (first & 7) & 0xFF
        begin += 1
    page[begin:end] = _ONES[: end - begin]
    if last & 7:
        page[end] |= (1 << (last & 7)) - 1


def _runs(page: _Page) -> Iterator[tuple[int, int]]:
    """Yield (first, behind the last) of each run of set bits in *page*."""
    if page == _ONES:
        yield 0, _PAGE_BITS
        return
    # A text of digits, lowest bit first: searching it is the interpreter's fastest way over single bits.
    digits = format(int.from_bytes(page, "little"), "b")[::-1]
    position = digits.find("1")
    while position >= 0:
        end = digits.find("0", position)
        if end < 0:
            end = len(digits)
        yield position, end
        position = digits.find("1", end)

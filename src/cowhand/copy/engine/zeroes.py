"""Finding the zeroes in what was read: most blocks are told apart by their first byte, the rest by one comparison of memory."""

from __future__ import annotations

_LARGE = 1 << 16
_ZEROES = bytes(_LARGE)
_HEAD = bytes(64)


def data_parts(buffer: bytearray, length: int, offset: int, grain: int, shortest: int = 0) -> list[tuple[int, int]]:
    """Return the (begin, end) positions in the first *length* bytes of *buffer* that hold data, ascending, not adjoining.

    The rest is zeroes. *offset* is where the buffer lies in the disk; what is told apart are blocks of *grain* bytes, aligned in the disk.
    Zeroes between data count as data when they are fewer than *shortest*.
    """
    parts: list[tuple[int, int]] = []
    begin = 0
    for start, stop in zero_ranges(buffer, length, offset, grain):
        if begin < start:
            if parts and begin - parts[-1][1] < shortest:
                begin = parts.pop()[0]
            parts.append((begin, start))
        begin = stop
    if begin < length:
        if parts and begin - parts[-1][1] < shortest:
            begin = parts.pop()[0]
        parts.append((begin, length))
    return parts


def zero_ranges(buffer: bytearray, length: int, offset: int, grain: int) -> list[tuple[int, int]]:
    """Return the (begin, end) positions of whole blocks of zeroes, ascending, joined; the first and last block may be parts of one."""
    lead = min(-offset % grain, length)
    ranges: list[tuple[int, int]] = []
    if lead and _zeroes_until(buffer, 0, lead, lead):
        ranges.append((0, lead))
    heads = bytes(memoryview(buffer)[lead:length:grain])
    index = heads.find(0)
    while index >= 0:
        begin = lead + index * grain
        end = _zeroes_until(buffer, begin, length, grain)
        if end == begin:
            index = heads.find(0, index + 1)
            continue
        if ranges and ranges[-1][1] == begin:
            begin = ranges.pop()[0]
        ranges.append((begin, end))
        index = heads.find(0, -(-(end - lead) // grain))
    return ranges


def _zeroes_until(buffer: bytearray, begin: int, length: int, grain: int) -> int:
    """Return the end of the blocks of *grain* from *begin* on that are all zero; *begin* when the first one is not."""
    if length - begin >= 64 and not buffer.startswith(_HEAD, begin):
        return begin
    position = begin
    while length - position >= _LARGE and buffer.startswith(_ZEROES, position):
        position += _LARGE
    position -= (position - begin) % grain
    block = _ZEROES[:grain] if grain <= _LARGE else bytes(grain)
    while position < length:
        count = min(grain, length - position)
        if not buffer.startswith(block if count == grain else block[:count], position):
            break
        position += count
    return position

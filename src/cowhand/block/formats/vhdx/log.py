"""The log of a VHDX ([MS-VHDX] 2.3): changes of metadata that are to be made again after a crash, and how they are logged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cowhand.block.formats.vhdx.layout import seal, sealed

if TYPE_CHECKING:
    from cowhand.block.node.node import Child

SECTOR = 4096
#: signature, checksum, length, tail, sequence number, descriptors, log's id, flushed and last offset of the file
ENTRY = struct.Struct("<4sIIIQI4x16sQQ")
#: signature, bytes (of zeroes: 4 unused and a length; of data: the sector's last 4 and first 8), offset, sequence number
ZERO_DESCRIPTOR, DATA_DESCRIPTOR = struct.Struct("<4s4xQQQ"), struct.Struct("<4s4s8sQQ")
_FIRST_DESCRIPTOR = ENTRY.size
#: Descriptors that fit beside the header in one sector.
PER_SECTOR = (SECTOR - _FIRST_DESCRIPTOR) // 32
#: Bytes of entries whose checksums are worked out, and descriptors that are replayed, at most.
MAX_CHECKED, MAX_DESCRIPTORS = 48 << 20, 1 << 16


class _Entry(NamedTuple):
    at: int
    length: int
    tail: int
    sequence: int
    flushed: int
    last: int
    raw: bytes


class Replay:
    """What a log says that the file holds: *sectors* of 4 KiB by offset, over *zeroes*, (begin, end), over the file."""

    def __init__(self) -> None:
        self.sectors: dict[int, bytes] = {}
        self.zeroes: list[tuple[int, int]] = []
        self.last = 0  #: how long the file has to be

    def patch(self, offset: int, view: memoryview) -> None:
        """Have *view*, read from *offset* of the file, be what the log says."""
        end = offset + len(view)
        for low, high in self.zeroes:
            low, high = max(low, offset), min(high, end)
            if low < high:
                view[low - offset : high - offset] = bytes(high - low)
        if not self.sectors:
            return
        for at in range(offset - offset % SECTOR, end, SECTOR):
            data = self.sectors.get(at)
            if data is not None:
                low, high = max(at, offset), min(at + SECTOR, end)
                view[low - offset : high - offset] = data[low - at : high - at]


def read(
    file: Child, begin: int, length: int, identity: bytes, wrong: Callable[[str, int], Exception]
) -> Replay | None:
    """Return what the log at *begin* of *file* demands; None where it holds nothing. Raises what *wrong* makes of a text and an offset."""
    log = bytearray(length)
    file.read_into(begin, log)
    entries: dict[int, _Entry] = {}
    budget = MAX_CHECKED
    for at in range(0, length, SECTOR):
        if log[at : at + 4] != b"loge" or log[at + 32 : at + 48] != identity:
            continue
        entry = _entry(log, at)
        if entry is None:
            continue
        budget -= entry.length
        if budget < 0:
            raise wrong("the log holds more entries than it has space for", begin + at)
        if sealed(bytearray(entry.raw)):
            entries[at] = entry
    best: list[_Entry] = []
    steps = 4 * len(entries) + 64
    for head in sorted(entries.values(), key=lambda one: one.sequence, reverse=True):
        chain: list[_Entry] = []
        at = head.tail
        while steps > 0 and at in entries:
            steps -= 1
            entry = entries[at]
            if chain and entry.sequence != chain[-1].sequence + 1:
                break
            chain.append(entry)
            if entry is head:
                break
            at = (at + entry.length) % length
        if chain and chain[-1] is head:
            best = chain
            break
    if not best:
        return None
    replay = Replay()
    if best[-1].flushed > file.node.size:
        raise wrong(f"the file has {file.node.size} bytes, and had {best[-1].flushed} when the log was written", begin)
    replay.last = best[-1].last
    count = 0
    for entry in best:
        count += int.from_bytes(entry.raw[24:28], "little")
        if count > MAX_DESCRIPTORS:
            raise wrong(f"the log has more than {MAX_DESCRIPTORS} descriptors", begin)
        _apply(entry, replay, wrong, begin)
    return replay


def _entry(log: bytearray, at: int) -> _Entry | None:
    _, _, length, tail, sequence, _, _, flushed, last = ENTRY.unpack_from(log, at)
    if not SECTOR <= length <= len(log) or length % SECTOR or tail % SECTOR or tail >= len(log) or not sequence:
        return None
    raw = bytes(log[at : at + length])
    raw += bytes(log[: length - len(raw)])
    return _Entry(at, length, tail, sequence, flushed, last, raw)


def _apply(entry: _Entry, replay: Replay, wrong: Callable[[str, int], Exception], begin: int) -> None:
    count = int.from_bytes(entry.raw[24:28], "little")
    data = -(-(_FIRST_DESCRIPTOR + 32 * count) // SECTOR) * SECTOR
    if data > entry.length:
        raise wrong(f"an entry of the log has {count} descriptors in {entry.length} bytes", begin + entry.at)
    for number in range(count):
        at = _FIRST_DESCRIPTOR + 32 * number
        kind = entry.raw[at : at + 4]
        if kind == b"zero":
            _, length, offset, sequence = ZERO_DESCRIPTOR.unpack_from(entry.raw, at)
            good = not (length % SECTOR or offset % SECTOR)
            if good:
                for known in [known for known in replay.sectors if offset <= known < offset + length]:
                    del replay.sectors[known]
                replay.zeroes.append((offset, offset + length))
        elif kind == b"desc":
            _, trailing, leading, offset, sequence = DATA_DESCRIPTOR.unpack_from(entry.raw, at)
            sector = entry.raw[data : data + SECTOR]
            high, low = int.from_bytes(sector[4:8], "little"), int.from_bytes(sector[-4:], "little")
            good = sector[:4] == b"data" and len(sector) == SECTOR and high << 32 | low == entry.sequence
            good = good and offset % SECTOR == 0
            if good:
                replay.sectors[offset] = leading + sector[8:-4] + trailing
            data += SECTOR
        else:
            good, sequence = False, entry.sequence
        if not good or sequence != entry.sequence:
            raise wrong(f"descriptor {number} of an entry of the log cannot be", begin + entry.at + at)


class Writer:
    """Writes entries, each of which is done before the next one: an entry is its own tail. Used by one thread at a time."""

    def __init__(self, file: Child, begin: int, length: int, identity: bytes) -> None:
        self._file, self._begin, self._length, self._identity = file, begin, length, identity
        self._head = 0
        self._sequence = 1

    def change(self, sectors: dict[int, bytes], size: int) -> None:
        """Have *sectors* of 4 KiB, by offset, reach the file of *size* bytes all or not at all. They are stable when it returns."""
        waiting = sorted(sectors.items())
        most = min(PER_SECTOR, self._length // SECTOR // 2 - 1)
        for first in range(0, len(waiting), most):
            part = waiting[first : first + most]
            begin = self._begin + self._head
            self._log(part, size)
            self._file.flush()
            for offset, data in part:
                self._file.write(offset, (data,))
            self._file.flush()
            # It is done. Doing it once more would do no harm, but some programs do not read a file whose log is not empty.
            self._file.write(begin, (bytes(SECTOR),))

    def _log(self, part: list[tuple[int, bytes]], size: int) -> None:
        length = SECTOR * (1 + len(part))
        raw = bytearray(length)
        fields = (length, self._head, self._sequence, len(part), self._identity, size, size)
        ENTRY.pack_into(raw, 0, b"loge", 0, *fields)
        for number, (offset, data) in enumerate(part):
            place = _FIRST_DESCRIPTOR + 32 * number
            DATA_DESCRIPTOR.pack_into(raw, place, b"desc", data[-4:], data[:8], offset, self._sequence)
            high, low = (
                (self._sequence >> 32).to_bytes(4, "little"),
                (self._sequence & 0xFFFFFFFF).to_bytes(4, "little"),
            )
            raw[SECTOR * (1 + number) : SECTOR * (2 + number)] = b"data" + high + data[8:-4] + low
        sealed_entry = seal(raw)
        before = min(length, self._length - self._head)
        self._file.write(self._begin + self._head, (sealed_entry[:before],))
        if before < length:
            self._file.write(self._begin, (sealed_entry[before:],))
        self._head = (self._head + length) % self._length
        self._sequence += 1

"""Writing compressed clusters: each worker compresses its piece, and the results are placed one behind the other in the order of the disk.

Compression releases the interpreter lock, so it uses every core. What the format places side by side is written in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind, Reservation
from cowhand.block.node.node import Child
from cowhand.copy.engine.sink import LaneSink, Parts
from cowhand.core.errors import NotSupported
from cowhand.core.extents import DATA

SECTOR = 512


class _Unit(NamedTuple):
    """One allocation unit: where it lies in the piece, and its compressed form; None when it is to be stored as it is."""

    begin: int
    end: int
    payload: bytes | None


class CompressedSink(LaneSink):
    """Stores each allocation unit that is not zero compressed, where that makes it smaller."""

    works_long = True

    def __init__(self, disk: Disk, node: FormatNode, *, sparse: int, reads_zero: bool, codec: Any) -> None:
        super().__init__(disk, node, sparse=sparse, reads_zero=reads_zero)
        self._compress = codec.compress
        # A unit is stored as a whole, so only wholly zero ones can be left out.
        self.part = self.unit
        self.grain = self.unit if sparse else 0
        self.sparse = min(sparse, self.unit)

    @property
    def direct(self) -> bool:
        return self.disk.root is self.node

    def prepare(self, offset: int, buffer: bytearray, length: int, gaps: Sequence[tuple[int, int]] = ()) -> Any:
        parts: Parts = super().prepare(offset, buffer, length, gaps)
        units: list[_Unit] = []
        unit, compress = self.unit, self._compress
        with memoryview(buffer) as view:
            for begin, end in parts:
                for position in range(begin, end, unit):
                    stop = min(position + unit, end)
                    data = view[position:stop]
                    # Behind the end of the disk a unit is filled with zeroes, as its reader expects a whole one.
                    payload = compress(data if stop - position == unit else bytes(data).ljust(unit, b"\0"))
                    units.append(_Unit(position, stop, payload))
        return parts, units

    def place(
        self, offset: int, buffer: bytearray, length: int, prepared: Any, gaps: Sequence[tuple[int, int]] = ()
    ) -> Any:
        parts, units = prepared
        if not self.direct:
            return LaneSink.place(self, offset, buffer, length, parts, gaps)
        if not self.reads_zero:
            self.zero_between(offset, length, [*parts, *gaps])
        placed: list[tuple[_Unit, Reservation]] = []
        plain: list[_Unit] = []
        try:
            for shrunk, stretch in groupby(units, lambda unit: unit.payload is not None):
                if shrunk:
                    self._claim_all(offset, list(stretch), placed, plain)
                else:
                    plain += stretch
            moves = self.place_parts(offset, [(unit.begin, unit.end) for unit in plain])
        except BaseException as error:
            for _, reservation in placed:
                self.node.give_up(reservation, error)
            raise
        return placed, moves

    def _claim_all(
        self, offset: int, units: list[_Unit], placed: list[tuple[_Unit, Reservation]], plain: list[_Unit]
    ) -> None:
        """Take space for *units*, which shrank and lie side by side, and add each to *placed*, or else to *plain*."""
        node, size = self.node, self.unit
        pieces = [(offset + unit.begin, len(unit.payload or b"")) for unit in units]
        begin, end = pieces[0][0], pieces[-1][0] + size
        made = node.claim_compressed(pieces) if self._nothing_at(begin, min(end, node.size) - begin) else []
        placed += zip(units, made, strict=False)
        for unit, (start, nbytes) in zip(units[len(made) :], pieces[len(made) :], strict=True):
            # In an existing image: over data that is there, compressed clusters cannot be placed everywhere.
            free = self._nothing_at(start, unit.end - unit.begin)
            reservation = node.claim(start, size, Kind.COMPRESSED, nbytes) if free else None
            if reservation is None:
                plain.append(unit)
            else:
                placed.append((unit, reservation))

    def _nothing_at(self, start: int, length: int) -> bool:
        end = start + length
        while start < end:
            count, flags, _, _ = self.node.map(start, end - start)
            if flags & DATA:
                return False
            start += count
        return True

    def store(self, offset: int, buffer: bytearray, placed: Any) -> None:
        if not isinstance(placed, tuple):
            super().store(offset, buffer, placed)
            return
        reservations, moves = placed
        written = False
        try:
            for child, host, payloads in _adjoining(reservations):
                child.write(host, payloads)
            written = True  # from here on finish_units ends the reservations, whatever happens
            failure = self.node.finish_units([reservation for _, reservation in reservations])
            if failure is not None:
                raise failure
        except BaseException as error:
            for _, reservation in () if written else reservations:
                self.node.give_up(reservation, error)
            self.give_up(moves, error)
            raise
        finally:
            for hook in self.node.hooks:
                for unit, _ in reservations:
                    hook(offset + unit.begin, unit.end - unit.begin)
        super().store(offset, buffer, moves)

    def finish(self) -> None:
        """Fill the last sector: some readers take a file that ends inside one for damaged."""
        child = self.node.primary
        if child is not None:
            missing = -child.node.size % SECTOR
            if missing:
                child.write(child.node.size, (bytes(missing),))


def _adjoining(placed: list[tuple[_Unit, Reservation]]) -> list[tuple[Child, int, list[bytes]]]:
    """Return (child, host offset, payloads) of what lies side by side in the file."""
    out: list[tuple[Child, int, list[bytes]]] = []
    end = -1
    for unit, reservation in placed:
        assert unit.payload is not None
        assert reservation.child is not None
        if reservation.host == end and out[-1][0] is reservation.child:
            out[-1][2].append(unit.payload)
        else:
            out.append((reservation.child, reservation.host, [unit.payload]))
        end = reservation.host + len(unit.payload)
    return out


def choose_compressed(disk: Disk, *, sparse: int, reads_zero: bool, level: int | None) -> CompressedSink:
    """Return the sink for *disk*'s format; raises NotSupported where it does not compress, or something stands between."""
    node = disk.root
    if not isinstance(node, FormatNode) or not hasattr(node, "codec"):
        raise NotSupported("Compression not supported for this file format", path=disk.filename)
    if node.encodes:
        raise NotSupported("Compression and encryption not supported at the same time", path=disk.filename)
    if level is not None and hasattr(node, "set_compression_level"):
        node.set_compression_level(level)
    return CompressedSink(disk, node, sparse=sparse, reads_zero=reads_zero, codec=node.codec)

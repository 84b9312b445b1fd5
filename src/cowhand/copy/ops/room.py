"""Is there room for what is to be written into an image that exists? Looked at before its first byte changes.

What an image stores already needs nothing: only units that its own layer does not hold yet, or that are holes of its file. A file system is asked
what this user may still take; a device ends where it ends, so what the format knows to be free there is added up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.graph.block_status import skip_filters
from cowhand.copy.engine.engine import PIECE
from cowhand.copy.engine.plan import DATA, Run
from cowhand.core import extents
from cowhand.core.buffers import is_zero
from cowhand.core.errors import NoSpace
from cowhand.core.mounts import described, free_bytes, may_compress
from cowhand.core.units import format_size
from cowhand.image.create import local_path

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.node import BlockNode, Child
    from cowhand.copy.engine.source import Source
    from cowhand.core.progress import CancelToken


class Room(NamedTuple):
    """What is needed and what is there, in bytes; ``place`` is what they are needed on. ``certain``: less than needed does not do."""

    needed: int
    free: int
    place: str
    certain: bool

    @property
    def missing(self) -> int:
        """How many bytes more are needed than are free."""
        return max(0, self.needed - self.free)

    def words(self) -> str:
        """Return "55 MiB are needed and 30 MiB are free on the file system (...)"."""
        return f"{format_size(self.needed)} are needed, and {format_size(self.free)} are free on {self.place}"


def storage_of(node: BlockNode) -> BlockNode:
    """Return the protocol node that holds the data of the image *node*: its file, or its external data file."""
    node = skip_filters(node)
    outside: Child | None = getattr(node, "data_child", None)
    if outside is not None:
        node = outside.node
    while node.primary is not None:
        node = node.primary.node
    return node


def room_for(disk: Disk, runs: Callable[[], Iterable[Run]], most: int) -> Room | None:
    """Return the room for the data of *runs*, at most *most* bytes, in *disk*; None where it is enough for all, or nothing is known.

    *runs* is called only where there may be too little.
    """
    storage = storage_of(disk.root)
    path = local_path(storage.filename)
    if path is None or not os.path.exists(path):
        return None
    node = skip_filters(disk.root)
    if storage.driver == "host_device":
        return _room_on_device(disk, node, storage, runs)
    free = free_bytes(path)
    if storage.driver != "file" or free is None or free >= most + _spare(node, most):
        return None
    stored, tables = _missing(disk, node, runs())
    # Space of clusters that the image knows to be free may still be on the medium.
    free += node.unused_space(storage.size) or 0 if isinstance(node, FormatNode) else 0
    room = Room(stored + tables, free, described(path), not may_compress(path))
    return room if room.missing else None


def _room_on_device(disk: Disk, node: BlockNode, storage: BlockNode, runs: Callable[[], Iterable[Run]]) -> Room | None:
    """Of a device that was made as long as the disk every byte is there; a format that allocates has what it does not use yet."""
    if not isinstance(node, FormatNode):
        return None
    free = node.unused_space(storage.size)
    if free is None:
        return None
    needed, tables = _missing(disk, node, runs(), placed=extents.OFFSET)
    room = Room(needed + tables, free, f"the device '{storage.filename}'", True)
    return room if room.missing else None


def _spare(node: BlockNode, most: int) -> int:
    """Return more than the tables for *most* bytes take."""
    unit = node.allocation_unit if isinstance(node, FormatNode) else 512
    return 16 * unit + most // 256


def _missing(disk: Disk, node: BlockNode, runs: Iterable[Run], *, placed: int = extents.DATA) -> tuple[int, int]:
    """Return the bytes of *runs*, in whole units, that lie nowhere yet, and those of the tables that they need."""
    unit = node.allocation_unit if isinstance(node, FormatNode) else 4096
    total = covered = 0
    starts: list[tuple[int, int]] = []
    for start, length, kind in runs:
        if kind != DATA:
            continue
        begin = max(start - start % unit, covered)
        covered = max(-(-(start + length) // unit) * unit, covered)
        if begin >= covered:
            continue
        inside = max(0, min(covered, disk.size) - begin)
        lacking = [] if inside else [(begin, covered - begin)]
        if inside:
            for batch in disk.extents(begin, inside, depth=1):
                for row in batch:
                    # A compressed cluster is not written in its place.
                    if not row.flags & placed or row.flags & extents.COMPRESSED or not row.flags & extents.ALLOCATED:
                        lacking.append((row.start, row.length))
            if inside < covered - begin and covered - begin - inside >= unit:
                lacking.append((begin + inside, covered - begin - inside))
        for at, count in lacking:
            whole = at - at % unit
            total += -(-(at + count) // unit) * unit - whole
            starts.append((whole, at + count - whole))
    tables = node.tables_needed(starts) if isinstance(node, FormatNode) else 0
    return total, tables


def holding_data(source: Source, runs: Iterable[Run], unit: int, cancel: CancelToken | None = None) -> Iterator[Run]:
    """Yield those units of *runs* whose bytes are not all zero: what a copy that leaves out zeroes stores. Reads the source."""
    buffer = bytearray(max(PIECE, unit))
    for start, length, kind in runs:
        if kind != DATA:
            continue
        for begin in range(start, start + length, len(buffer)):
            if cancel is not None:
                cancel.check()
            view = memoryview(buffer)[: min(len(buffer), start + length - begin)]
            source.read_into(begin, view)
            for at in range(0, len(view), unit):
                if not is_zero(view[at : at + unit]):
                    yield Run(begin + at, min(unit, len(view) - at), DATA)


def require(room: Room | None, name: str, doing: str, *, warn: Callable[[str], None] | None = None) -> None:
    """Raise NoSpace where *room* is certainly too little for *doing* something to the image *name*; tell *warn* where it may be."""
    if room is None or not room.missing:
        return
    if not room.certain:
        if warn is not None:
            warn(f"{doing} may not fit: {room.words()}")
        return
    raise NoSpace(
        f"{doing} does not fit, and nothing was changed: {room.words()}",
        path=name,
        qemu=os.strerror(28),
        hint=f"Make {format_size(room.missing)} free.",
        needed=room.needed,
        free=room.free,
    )

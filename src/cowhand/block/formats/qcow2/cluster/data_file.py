"""Guest data in a file of its own (QEMU ``docs/interop/qcow2``, "External data file"): opening, allocating, zeroing, discarding, resizing.

A guest cluster lies in the data file at its own offset or nowhere: nothing is allocated or counted there, entries only say whether the place is in
use. A *raw* data file has to read like the disk by itself: all its clusters stay in use, and zeroes are written to it as well.
"""

from __future__ import annotations

import errno
import os
from array import array
from typing import TYPE_CHECKING, Any

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind, Reservation
from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.cluster.mapping import DAMAGED, NORMAL, ZERO_HOST, ZERO_PLAIN, Mapping
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.node.node import Child, Request, Role, Zeroing
from cowhand.core.buffers import ZEROES, ZEROES_SIZE
from cowhand.core.errors import CowhandError, InvalidArgument, InvalidFormat, NotSupported
from cowhand.core.extents import IN_PLACE, NO_HOST, OFFSET, ExtentBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping as Mapping_, Sequence

    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.ondisk.header import Header
    from cowhand.block.opening.opening import Opening

_unpack = L.U64.unpack_from
_NAME = "data-file"
_SEEK_DATA = getattr(os, "SEEK_DATA", None)


def attach(node: Qcow2Node, opening: Opening, given: dict[str, Any]) -> None:
    """Open the data file that the user gave as "data-file", or the one that the header names, if the policy lets it; it becomes ``data_child``.

    The header's name is a plain path, as in QEMU: no protocol, no description, relative to the working directory.
    """
    description = given.pop(_NAME, None)
    child = opening.child(node, _NAME, description, Role.DATA) if description is not None else None
    header, path = node.header, node.filename
    if not node.external:
        if child is not None:
            raise InvalidArgument("'data-file' can only be set for images with an external data file", path=path)
        if header.autoclear & L.AUTOCLEAR_RAW_DATA and header.version >= 3:
            raise InvalidFormat("data-file-raw requires an external data file", path=path, offset=L.OFFSET_AUTOCLEAR)
        return
    name = data_file_name(header)
    if child is None and name and opening.with_backing:
        child = opening.implicit_file(node, _NAME, name, Role.DATA, what="data file")
    if child is not None:
        node.data_child = child
    elif opening.with_backing:
        raise InvalidArgument(
            "'data-file' is required for this image", path=path, hint="The image names no data file: give it with data-file.filename=PATH."
        )  # fmt: skip
    else:
        node.data_missing = True


def data_file_name(header: Header) -> str:
    """Return the name of the data file that *header* has, "" for none."""
    return (header.find(L.EXT_DATA_FILE) or b"").split(b"\0")[0].decode("utf-8", "surrogateescape")


def plan(header: Header, options: Mapping_[str, Any]) -> None:
    """Put what *options* say of a data file into the *header* of a new image. Raises InvalidArgument in QEMU's words."""
    name, raw = options.get("data_file"), options.get("data_file_raw")
    if raw and not name:
        raise InvalidArgument("data-file-raw requires data-file")
    if options.get("keep_data_file") and not name:
        raise InvalidArgument("keep_data_file requires data_file")
    if raw and options.get("backing_file"):
        raise InvalidArgument("Backing file and data-file-raw cannot be used at the same time")
    if not name:
        return
    if header.version < 3:
        raise InvalidArgument(
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    header.incompatible |= L.INCOMPAT_DATA_FILE
    header.set(L.EXT_DATA_FILE, str(name).encode("utf-8", "surrogateescape"))
    if raw:
        header.autoclear |= L.AUTOCLEAR_RAW_DATA


def missing(node: Qcow2Node) -> CowhandError:
    """Return the error for guest I/O on an image that was opened without what its header names."""
    return NotSupported(f"the data file of '{node.filename}' is not open", path=node.filename)


class ExternalMapping(Mapping):
    """The mapping of an image whose data lies in another file: an entry in use names its own guest offset, and at offset 0 only COPIED says so."""

    def places(self, batch: Sequence[Request]) -> tuple[int, list[int]] | None:
        return None

    def run(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        index = offset >> self.table_shift
        table = self.find(index)
        if table is None:
            return min(length, ((index + 1) << self.table_shift) - offset), 0, None, NO_HOST
        data, size, node = table.data, self.cluster_size, self.node
        at = (offset >> self.cluster_bits & (self.entries - 1)) << 3
        entry = _unpack(data, at)[0]
        within = offset & (size - 1)
        have = size - within
        host = entry & L.L2_OFFSET_MASK
        here = entry & L.COPIED or host
        if entry & L.ENTRY_COMPRESSED or (host and host != offset - within) or (
            here and not host and offset >= size and not entry & L.ENTRY_ZERO
        ):  # fmt: skip
            return min(have, length), DAMAGED, node.file, at
        if not here or (entry & L.ENTRY_ZERO and not host):
            return self._same(data, at, entry, have, length, ZERO_PLAIN if entry & L.ENTRY_ZERO else 0, NO_HOST)
        flags = ZERO_HOST if entry & L.ENTRY_ZERO else NORMAL | IN_PLACE if entry & L.COPIED else NORMAL
        while have < length:
            at += 8
            entry += size
            if at >= size or _unpack(data, at)[0] != entry:
                break
            have += size
        have = min(have, length)
        if offset + have > self.end and flags != ZERO_HOST and not node.data_missing:
            there = self.present(offset, have)
            if not there:
                return have, DAMAGED, node.file, at
            have = there
        if node.data_missing and flags != ZERO_HOST:
            flags = DAMAGED
        return min(have, length), flags, node.data_child, offset

    def lost(self, entry: int, table: Table, at: int, guest: int) -> CowhandError | None:
        host = entry & L.L2_OFFSET_MASK
        if self.node.data_missing or host not in (guest & -self.cluster_size, self._nowhere):
            return None
        return super().lost(entry, table, at, guest)

    def bad_entry(self, entry: int, table: Table, at: int) -> CowhandError:
        node, index = self.node, at // 8
        if entry & L.ENTRY_COMPRESSED:
            text = f"Compressed cluster entry found in image with external data file (L2 offset: {table.host:#x}, L2 index: {L.c_hex(index)})"
            return node.mark_corrupt(text, offset=table.host + at)
        offset = entry & L.L2_OFFSET_MASK
        if offset & (self.cluster_size - 1):
            return super().bad_entry(entry, table, at)
        if node.data_missing:
            return missing(node)
        text = f"External data file host cluster offset {offset:#x} does not match guest cluster offset, L2 index: {L.c_hex(index)})"
        return node.mark_corrupt(text, offset=table.host + at)

    def _alike(self, entries: array[int], l1_entry: int) -> tuple[int, int] | None:
        return None if entries[0] & (L.COPIED | L.ENTRY_COMPRESSED) else super()._alike(entries, l1_entry)

    def _rows(
        self, out: ExtentBatch, entries: array[int], table: Table, first: int, offset: int, stop: int, recurse: int, numpy: bool
    ) -> int:  # fmt: skip
        before = max(0, len(out) - 1)
        size = self.cluster_size
        if offset < size and entries[0] & ~L.L2_RESERVED_MASK == L.COPIED:
            end = min(stop, size)
            out.add(offset, end - offset, NORMAL | recurse, offset, self.node.data_child.node)
            offset, first, entries = end, first + 1, entries[1:]
        if entries:
            offset = super()._rows(out, entries, table, first, offset, stop, recurse, numpy)
        for row in range(before, len(out)):
            if out.flags[row] & OFFSET and out.host[row] not in (out.start[row], self._nowhere + out.start[row] % size):
                at = (out.start[row] >> self.cluster_bits & (self.entries - 1)) << 3
                raise self.bad_entry(_unpack(table.data, at)[0], table, at)
        return offset


def is_hole(child: Child, begin: int, end: int) -> bool:
    """Tell whether the data file holds nothing in ``[begin, end)``, and so reads as zeroes; False where that is not told by one system call."""
    lane = child.lane
    if lane is None or lane.lane_fd < 0 or _SEEK_DATA is None:
        return False
    try:
        return os.lseek(lane.lane_fd, begin, _SEEK_DATA) >= end
    except OSError as error:
        return error.errno == errno.ENXIO  # behind the last data


def reserve_data(node: Qcow2Node, table: Table, first: int, count: int, begin: int) -> Reservation | None:
    """Reserve the guest clusters from *begin* on (entries *first* and following of *table*) for data; None: write in place."""
    from cowhand.block.formats.qcow2.cluster.allocation import EntryChange

    if node.data_missing:
        raise missing(node)
    size = node.cluster_size
    data = table.data
    run = 0
    while run < count:
        entry = _unpack(data, (first + run) * 8)[0]
        host = entry & L.L2_OFFSET_MASK
        place = begin + run * size
        if entry & L.ENTRY_COMPRESSED or (host and host != place):
            if not run:
                raise node.mapping.bad_entry(entry, table, first * 8)
            break
        if entry & L.COPIED and not entry & L.ENTRY_ZERO and host == place:
            break
        run += 1
    if not run:
        node.mapping.require(L.U64.unpack_from(data, first * 8)[0], table, first * 8, begin)
        return None
    entries = array("Q", range(begin | L.COPIED, (begin | L.COPIED) + run * size, size))
    entries.byteswap()
    # What the file holds there is older than what is seen now, and the new bytes have to be stable first.
    change = EntryChange(table, first, entries.tobytes(), barrier=True)
    fresh = is_hole(node.data_child, begin, begin + run * size)
    return Reservation(begin, run * size, Kind.DATA, node.data_child, begin, fresh=fresh, state=change)


def change(node: Qcow2Node, offset: int, length: int, kind: Kind) -> None:
    """Bring whole clusters to a state without data: in the data file first where that has to follow, and then in the tables.

    Where the backing file is to show through it is the other way round, and the tables are stable in between: a hole would hide it.
    """
    node.check_writable()
    end = offset + length
    uncovered: list[tuple[int, int, Any]] = []
    while offset < end:
        reservation = node.claim(offset, end - offset, kind)
        assert reservation is not None
        stop = min(reservation.end, node.size)
        part = reservation.begin, stop - reservation.begin, reservation.state
        try:
            if kind == Kind.EMPTY:
                uncovered.append(part)
            elif stop > reservation.begin:
                _follow(node, *part, kind)
        except BaseException as error:
            node.give_up(reservation, error)
            raise
        FormatNode.finish(node, reservation)
        offset = reservation.end
    if uncovered:
        node.flush()
    for begin, count, state in uncovered:
        if count > 0:
            _follow(node, begin, count, state, kind)


def _follow(node: Qcow2Node, offset: int, length: int, state: Any, kind: Kind) -> None:
    from cowhand.block.formats.qcow2.cluster.allocation import EntryChange

    child = node.data_child
    if kind in (Kind.ZERO, Kind.ZERO_UNMAP) and node.raw_data:
        if child.node.capabilities.zeroes is not Zeroing.NONE:
            child.write_zeroes(offset, length, unmap=kind == Kind.ZERO_UNMAP)
        else:
            for at in range(offset, offset + length, ZEROES_SIZE):
                child.write(at, (ZEROES[: min(ZEROES_SIZE, offset + length - at)],))
    elif kind != Kind.ZERO and isinstance(state, EntryChange) and state.discard and child.node.capabilities.discard:
        child.discard(offset, length)


def resize(node: Qcow2Node, size: int, mode: str = "off") -> None:
    """Have the data file reach to *size*; one that is longer keeps what it has."""
    lower = node.data_child.node
    if lower.size < size:
        lower.resize(size, preallocation=mode if mode in ("falloc", "full") else "off")


def shrink(node: Qcow2Node, size: int) -> None:
    """Cut the data file behind the disk's new end."""
    lower = node.data_child.node
    if lower.size > size and lower.capabilities.resizable:
        lower.resize(size, shrink=True)


def amend(options: Mapping_[str, Any], header: Header) -> Callable[[], None] | None:
    """Return what changes *header* as the *options* data_file and data_file_raw say, None where that is nothing."""
    name, raw = options.get("data_file"), options.get("data_file_raw")
    if not header.incompatible & L.INCOMPAT_DATA_FILE or (name is None and raw is None):
        return None

    def apply() -> None:
        if raw is False:
            header.autoclear &= ~L.AUTOCLEAR_RAW_DATA
        if name is not None:
            header.set(L.EXT_DATA_FILE, name.encode("utf-8", "surrogateescape") or None)

    return apply

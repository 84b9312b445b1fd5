"""Copying without moving data: sharing blocks between files (ioctl_ficlonerange(2)), or copy_file_range(2) when it is asked for.

Both ends must lie in files as they are: the source's bytes neither compressed nor encoded, the target a plain file or a format on the fast lane.
A lease on the source keeps its offsets valid meanwhile.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from cowhand.block.disk import Disk
from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind
from cowhand.block.node.node import Child
from cowhand.copy.engine.sink import LaneSink, Sink
from cowhand.core import syscalls
from cowhand.core.errors import from_os_error
from cowhand.core.extents import COMPRESSED, DATA, ENCODED, IN_PLACE, OFFSET, ZERO, Extent

if TYPE_CHECKING:
    from cowhand.copy.engine.source import Source

_PLAIN = DATA | OFFSET
_PLAIN_MASK = DATA | OFFSET | COMPRESSED | ENCODED | ZERO
_NOT_HERE = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.ETXTBSY}
)


#: The block of file systems that share blocks.
BLOCK = 4096
#: After so many pieces of which nothing can be shared no more are tried.
MISSES = 2


class _Refused(Exception):
    """Blocks cannot be shared here."""


class Cloner:
    """Copies whole runs inside the kernel while that works; after the first refusal ``active`` is False and stays so.

    *copying* uses copy_file_range(2), which moves data where blocks cannot be shared; otherwise only sharing counts.
    """

    #: bytes that are cloned at once
    piece = 64 << 20

    def __init__(self, source: Source, sink: Sink, *, copying: bool = False) -> None:
        self.source = source
        self.sink = sink
        self.copying = copying
        self.grain = max(BLOCK, sink.unit) if isinstance(sink, LaneSink) else BLOCK
        self.active = self._possible()
        self._misses = 0

    def _possible(self) -> bool:
        # Where the target's offsets are not multiples of a block no file system can share anything.
        if len(self.source.parts) != 1:
            return False
        if isinstance(self.sink, LaneSink):
            if self.sink.unit < BLOCK or self.sink.node.encodes:
                return False
            target = _descriptor_of(self.sink.node.primary)
        else:
            target = _plain_descriptor(self.sink.disk)
        if target < 0 or self.copying:
            return target >= 0
        root = self.source.parts[0].disk.root
        source = root.lane_fd if root.lane_fd >= 0 else _descriptor_of(root.primary)
        return source < 0 or _shares(source, target)

    def clone(self, start: int, length: int) -> int:
        """Copy the beginning of the data in ``[start, start + length)``; return how much. The rest has to be copied in another way."""
        part, at = self.source.locate(start)
        disk = part.disk
        inside = min(length, part.begin + part.length - at)
        done = 0
        with disk.lease(), self.sink.hold():
            if isinstance(self.sink, LaneSink) and not self.sink.direct:
                return 0  # a filter was inserted above the target: this piece goes through it
            rows = [row for batch in disk.extents(at, inside, depth=self.source.depth) for row in batch]
            try:
                for row in rows:
                    # Only whole blocks (and units of the target) can be shared.
                    count = row.length - row.length % self.grain if self._shareable(row) else 0
                    self._clone_row(row, start - at, count)
                    done += count
                    if count < row.length:
                        break
            except _Refused:
                self.active = False
        if not done and length >= self.grain:
            # Compressed or encoded throughout: larger pieces would only be in the way.
            self._misses += 1
            self.active = self.active and self._misses < MISSES
        return done

    def _shareable(self, row: Extent) -> bool:
        lane = getattr(row.node, "lane_fd", -1)
        return row.flags & _PLAIN_MASK == _PLAIN and lane >= 0 and (self.copying or not row.host % BLOCK)

    def _clone_row(self, row: Extent, delta: int, count: int) -> None:
        """Copy the first *count* bytes of *row*, whose offset in the target is greater by *delta*."""
        if not count:
            return
        source = row.node.lane_fd
        offset, end = row.start + delta, row.start + delta + count
        if not isinstance(self.sink, LaneSink):
            self._share(source, row.host, count, _plain_descriptor(self.sink.disk), offset)
            return
        node, begin = self.sink.node, offset
        try:
            while offset < end:
                host = row.host + (offset - delta - row.start)
                offset += self._clone_reserved(node, source, host, offset, end - offset)
        finally:
            for hook in node.hooks:
                hook(begin, count)

    def _clone_reserved(self, node: FormatNode, source: int, host: int, offset: int, length: int) -> int:
        count, flags, _, _ = node.map(offset, length)
        if flags & IN_PLACE and flags & DATA:
            raise _Refused  # over existing clusters the bytes have to be written
        reservation = node.claim(offset, length, Kind.DATA)
        if reservation is None:
            raise _Refused
        count = min(length, reservation.length)
        try:
            target = _descriptor_of(reservation.child)
            whole = reservation.begin == offset and reservation.end == offset + reservation.length
            if target < 0 or not whole or count != reservation.length:
                raise _Refused
            self._share(source, host, count, target, reservation.host)
        except BaseException as error:
            if isinstance(error, _Refused):
                # An error of the system, not one that leaves the node's state unknown.
                node.give_up(reservation, OSError(errno.EOPNOTSUPP, "not shared"))
            else:
                node.give_up(reservation, error)
            raise
        node.finish(reservation)
        return count

    def _share(self, source: int, source_offset: int, length: int, target: int, target_offset: int) -> None:
        try:
            if not self.copying:
                syscalls.clone_range(source, source_offset, length, target, target_offset)
                return
            while length > 0:
                done = syscalls.copy_range(source, source_offset, length, target, target_offset)
                if done == 0:
                    raise _Refused
                source_offset += done
                target_offset += done
                length -= done
        except OSError as error:
            if error.errno in _NOT_HERE:
                raise _Refused from error
            raise from_os_error(error, doing="copying inside the kernel") from error


def _shares(source: int, target: int) -> bool:
    """Ask the system whether two files could share blocks, by a request that every file system refuses in its own way."""
    try:
        syscalls.clone_range(source, 1, 1, target, 1)
    except OSError as error:
        return error.errno == errno.EINVAL  # not aligned: so it was looked at
    return True


def _plain_descriptor(disk: Disk) -> int:
    """Return the descriptor whose offsets are the disk's own, or -1."""
    return disk.edge.lane.lane_fd if disk.edge.lane is not None else -1


def _descriptor_of(child: Child | None) -> int:
    return child.lane.lane_fd if child is not None and child.lane is not None else -1

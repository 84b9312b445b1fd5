"""The filter "blklogwrites": does every request, and writes down what it changed, for replaying crashes.

Sources: the log format of Linux' dm-log-writes (``Documentation/admin-guide/device-mapper/log-writes.rst``), which the kernel's replay-log reads;
QEMU's ``BlockdevOptionsBlklogwrites``. A request enters the log when it has been done; a flush enters it before every write that ended while
it was under way, since it does not cover those.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.filters.base import FilterNode, open_child
from cowhand.block.node.node import Child, Role
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import Buffer
from cowhand.core.errors import InvalidArgument, InvalidFormat
from cowhand.core.extents import ExtentBatch
from cowhand.core.locks import RANK_SECTOR, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening

MAGIC = 0x6A736677736872
VERSION = 1
#: magic, version, number of entries, sector size
SUPER = struct.Struct("<QQQI")
#: sector, number of sectors, flags, length of the data of a mark
ENTRY = struct.Struct("<QQQQ")
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
#: QEMU's bounds on the sector size.
MIN_SECTOR, MAX_SECTOR = 512, 1 << 23


class BlkLogWritesOptions(NodeOptions):
    """Options of the filter but its children."""

    log_sector_size: int | None = option(kind="size", help="granularity of offsets and lengths (default 512)")
    log_append: bool = option(False, kind="bool", help="go on with an existing log")
    log_super_update_interval: int = option(
        4096, kind="int", help="entries between two updates of the super block", strong=False
    )


class BlkLogWritesNode(FilterNode):
    """A filter over "file" that logs to "log"."""

    driver: ClassVar[str] = "blklogwrites"
    options_class: ClassVar[type[NodeOptions]] = BlkLogWritesOptions
    options: BlkLogWritesOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self._lock = ranked_lock(RANK_SECTOR, "write log")
        self._calm = threading.Condition()
        self._flushing = 0
        self.sector_size = 512
        self.entries = 0
        self._next = 1  #: the sector of the next entry

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> BlkLogWritesNode:
        node = cls(options)
        opening.track(node)
        open_child(opening, node, "file", given, Role.FILTERED)
        open_child(opening, node, "log", given, Role.METADATA)
        node.start()
        node._begin()
        return node

    def _begin(self) -> None:
        options = self.options
        if options.log_append and options.log_sector_size is not None:
            raise InvalidArgument("log-append and log-sector-size are mutually exclusive")
        self.sector_size = 512 if options.log_sector_size is None else options.log_sector_size
        if options.log_append and self.log.node.size:
            self._find_end()
        if self.sector_size & (self.sector_size - 1) or not MIN_SECTOR <= self.sector_size < MAX_SECTOR:
            raise InvalidArgument(f"Invalid log sector size {self.sector_size}")
        if options.log_super_update_interval < 1:
            raise InvalidArgument(f"Invalid log superblock update interval {options.log_super_update_interval}")
        self.limits = self.limits._replace(request_alignment=max(self.sector_size, self.limits.request_alignment))

    def refit(self) -> None:
        self.start()
        self.limits = self.limits._replace(request_alignment=max(self.sector_size, self.limits.request_alignment))

    def _find_end(self) -> None:
        """Read the super block and step over the entries that it counts. Raises InvalidFormat."""
        path, size = self.log.node.filename, self.log.node.size
        head = bytearray(SUPER.size)
        if size >= len(head):
            self.log.read_into(0, head)
        magic, version, count, sector_size = SUPER.unpack(head)
        if magic != MAGIC:
            raise InvalidFormat("Invalid log superblock magic", path=path, offset=0)
        if version != VERSION:
            raise InvalidFormat(f"Unsupported log version {version}", path=path, offset=8)
        self.sector_size = sector_size
        if sector_size & (sector_size - 1) or not MIN_SECTOR <= sector_size < MAX_SECTOR:
            raise InvalidFormat(f"Invalid log sector size {sector_size}", path=path, offset=24)
        entry = bytearray(ENTRY.size)
        for number in range(count):
            offset = self._next * sector_size
            if offset + ENTRY.size > size:
                raise InvalidFormat(f"the log ends before entry {number} of {count}", path=path, offset=offset)
            self.log.read_into(offset, entry)
            _, sectors, flags, _ = ENTRY.unpack(entry)
            if flags & ~(FLUSH | FUA | DISCARD | MARK):
                raise InvalidFormat(f"Invalid flags {flags:#x} in log entry {number}", path=path, offset=offset + 16)
            self._next += 1 + (0 if flags & DISCARD else sectors)
        self.entries = count

    @property
    def log(self) -> Child:
        """The edge to the log."""
        return self.children["log"]

    def allocated_size(self) -> int | None:
        return self.below.node.allocated_size()

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        if child.role is Role.FILTERED:
            return perm, shared
        return super().child_permissions(child, perm, shared)

    def read_vmstate(self, offset: int, buffer: Buffer) -> None:
        self.below.node.read_vmstate(offset, buffer)

    def write_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.below.node.write_vmstate(offset, buffers)  # not a request of the guest's, and not logged

    # -- the log

    def _append(self, flags: int, offset: int, length: int, buffers: Sequence[Buffer], *, zeroes: bool = False) -> None:
        """Log a request that was done; data that is zero is not sent."""
        block = self.sector_size
        head = ENTRY.pack(offset // block, length // block, flags, 0).ljust(block, b"\0")
        with self._lock:
            place = self._next * block
            self.log.write(place, (head, *buffers))
            if zeroes:
                self.log.write_zeroes(place + block, length)
            self._next += 1 + (0 if flags & DISCARD else length // block)
            self.entries += 1
            if flags & FLUSH or self.entries % self.options.log_super_update_interval == 0:
                self._write_super()

    def _write_super(self) -> None:
        """Make the entries stable, then count them."""
        block = self.sector_size
        self.log.flush()
        self.log.write(0, (SUPER.pack(MAGIC, VERSION, self.entries, block).ljust(block, b"\0"),))
        self.log.flush()

    def _wait_for_flushes(self) -> None:
        with self._calm:
            self._calm.wait_for(lambda: not self._flushing)

    def close(self) -> None:
        if self.writable and "log" in self.children and self.capabilities.writable:
            with self._lock:
                self._write_super()

    # -- requests

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self.below.read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        # A buffer may change under the request: file and log get the same bytes.
        data = b"".join(buffers)
        self.below.write(offset, (data,), fua)
        self._wait_for_flushes()
        self._append(FUA if fua else 0, offset, len(data), (data,))

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.below.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)
        self._wait_for_flushes()
        self._append(FUA if fua else 0, offset, length, (), zeroes=True)

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)
        self._wait_for_flushes()
        self._append(DISCARD, offset, length, ())

    def flush(self) -> None:
        with self._calm:
            self._flushing += 1
        try:
            self.below.flush()
            self._append(FLUSH, 0, 0, ())
        finally:
            with self._calm:
                self._flushing -= 1
                self._calm.notify_all()

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        return self.below.node.map_batch(offset, length)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        self.below.node.resize(size, preallocation=preallocation, shrink=shrink)

"""Block devices of the host: the driver "host_device".

Sources: ``linux/fs.h`` (BLKSSZGET, BLKROGET, BLKDISCARD, BLKZEROOUT), fallocate(2) on block devices; QEMU's ``BlockdevOptionsFile``.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import ClassVar

from cowhand.block.protocols.file.node import FileNode
from cowhand.core import syscalls
from cowhand.core.errors import InvalidArgument, NotSupported


class HostDeviceNode(FileNode):
    """A block device of the host (a character device is taken as well, as QEMU does)."""

    driver: ClassVar[str] = "host_device"
    is_device: ClassVar[bool] = True

    def _check_kind(self, mode: int) -> None:
        if not stat.S_ISBLK(mode) and not stat.S_ISCHR(mode):
            raise InvalidArgument(
                f"'{self.driver}' driver requires '{self.path}' to be either a character or block device",
                path=self.path,
            )

    def _check_writable(self, fd: int, writable: bool) -> None:
        try:
            read_only = writable and syscalls.device_is_read_only(fd)
        except OSError:
            return  # not a block device
        if read_only:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def _measure(self) -> None:
        super()._measure()
        try:
            sector = syscalls.device_sector_size(self.fd)
        except OSError:
            sector = 1
        self.limits = self.limits._replace(zero_alignment=sector, discard_alignment=sector)

    def allocated_size(self) -> int | None:
        return 0  # as QEMU tells of a device: none of the host's file systems' space

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if self.failure is not None:
            self.refuse_poisoned()
        sector = self.limits.zero_alignment
        begin = -(-offset // sector) * sector
        end = (offset + length) // sector * sector
        if begin >= end:
            begin = end = offset + length
        for start, stop in ((offset, begin), (end, offset + length)):
            if start < stop:
                if not fallback:
                    raise NotSupported("zeroes can only be written as bytes here", path=self.path, offset=start)
                self._zero_bytes(start, stop - start)
        if begin < end:
            # Without NO_HIDE_STALE the kernel may itself write for zero_range; only punching is sure to be quick.
            native = unmap and self.options.discard != "ignore" and self._punch_and_extend(begin, end - begin)
            if not native and (not fallback or not self._zero_natively(begin, end - begin)):
                if not fallback:
                    raise NotSupported("zeroes can only be written as bytes here", path=self.path, offset=begin)
                self._zero_bytes(begin, end - begin)
        if fua:
            self.flush()

    def _punch_and_extend(self, offset: int, length: int) -> bool:
        if not self._can_punch:
            return False
        done = self._attempt(syscalls.punch_hole, offset, length)
        self._can_punch = done is not None
        return bool(done)

    def _zero_natively(self, offset: int, length: int) -> bool:
        return super()._zero_natively(offset, length) or bool(self._attempt(syscalls.zero_device, offset, length))

    def discard(self, offset: int, length: int) -> None:
        if self.failure is not None:
            self.refuse_poisoned()
        sector = self.limits.discard_alignment
        begin = -(-offset // sector) * sector
        end = (offset + length) // sector * sector
        if begin < end and self.options.discard != "ignore":
            self._attempt(syscalls.discard_device, begin, end - begin)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if preallocation != "off":
            raise NotSupported(
                f"Preallocation mode '{preallocation}' unsupported for this non-regular file", path=self.path
            )
        if size != self.size:
            raise NotSupported("Cannot resize device files", path=self.path, fixed=True)


class HostCdromNode(HostDeviceNode):
    """A drive whose medium is read as any device is; changing media is left to the host."""

    driver: ClassVar[str] = "host_cdrom"

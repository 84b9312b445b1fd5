"""System calls of Linux that Python does not offer: fallocate(2) with its modes, and the ioctls of block devices and reflinks.

Sources: fallocate(2), ioctl_ficlonerange(2), ``linux/fs.h``, ``linux/falloc.h``. Every function raises OSError as the system does; where the
system has no such call it raises ``OSError(ENOTSUP)``, so that a caller has one fallback for "not here" and "not on this file system".
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

LINUX = sys.platform.startswith("linux")

# linux/falloc.h
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

# linux/fs.h: SYNC_FILE_RANGE_WRITE
_SYNC_WRITE = 2

# linux/fs.h; the numbers are those of the generic ioctl encoding (x86, arm, riscv, s390; powerpc, mips and sparc differ in the direction bits)
_OTHER_ENCODING = os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha")) if hasattr(os, "uname") else False
_NONE, _WRITE, _READ = (1 << 29, 4 << 29, 2 << 29) if _OTHER_ENCODING else (0, 1 << 30, 2 << 30)
_BLKROGET = _NONE | 0x125E
_BLKSSZGET = _NONE | 0x1268
_BLKDISCARD = _NONE | 0x1277
_BLKZEROOUT = _NONE | 0x127F
_FICLONERANGE = _WRITE | (32 << 16) | 0x940D
_FS_IOC_GETFLAGS = _READ | (struct.calcsize("l") << 16) | 0x6601
_FS_IOC_SETFLAGS = _WRITE | (struct.calcsize("l") << 16) | 0x6602
_FS_IOC_FSGETXATTR = _READ | (28 << 16) | 0x581F
_FS_IOC_FSSETXATTR = _WRITE | (28 << 16) | 0x5820
_NOCOW_FLAG = 0x00800000
_XFLAG_EXTSIZE = 0x00000800

#: The highest offset that the system knows (off_t). What C takes for a number it cuts to this width without a word.
LAST_OFFSET = (1 << 63) - 1

_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY})

_fallocate: Any = None
_sync_file_range: Any = None


#: Reads and writes at an offset that leave the descriptor's position alone.
POSITIONED = hasattr(os, "preadv")
_position_lock = threading.Lock()


def _read_at(fd: int, buffers: Sequence[Any], offset: int) -> int:
    with _position_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        total = 0
        for buffer in buffers:
            data = os.read(fd, len(buffer))
            memoryview(buffer)[: len(data)] = data
            total += len(data)
            if len(data) < len(buffer):
                break
        return total


def _write_at(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
    with _position_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        total = 0
        for buffer in buffers:
            count = os.write(fd, buffer)
            total += count
            if count < len(buffer):
                break
        return total


preadv: Callable[..., int] = os.preadv if POSITIONED else _read_at
pwritev: Callable[..., int] = os.pwritev if POSITIONED else _write_at


def end_of(fd: int) -> int:
    """Return the length of the file or block device behind *fd*."""
    # lseek answers for devices too; nothing else uses the position, where positioned calls exist.
    return os.lseek(fd, 0, os.SEEK_END) if POSITIONED else os.fstat(fd).st_size


def refuse_far(offset: int, length: int) -> None:
    """Raise ``OSError(EFBIG)`` where ``[offset, offset + length)`` lies where no file reaches: it would be cut to another place."""
    if offset < 0 or length < 0 or offset + length > LAST_OFFSET:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def is_unsupported(error: OSError) -> bool:
    """Tell whether *error* means that the system, file system or device does not have the operation (and not that it failed)."""
    return error.errno in _UNSUPPORTED


def _load_fallocate() -> Any:
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    # glibc's fallocate takes a 32-bit off_t on 32-bit systems, fallocate64 never; musl has only the first, with 64 bits.
    function = getattr(library, "fallocate64", None) or library.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int

    def call(fd: int, mode: int, offset: int, length: int) -> None:
        while function(fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    return call


def _call_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    global _fallocate
    if length == 0:
        return  # the system call takes that for an error
    refuse_far(offset, length)
    if _fallocate is None:
        if not LINUX:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        _fallocate = _load_fallocate()
    _fallocate(fd, mode, offset, length)


def allocate(fd: int, offset: int, length: int, *, keep_size: bool = False) -> None:
    """Give the range space on the medium, its content unchanged, new bytes zero; the file grows to hold it unless *keep_size*.

    Not posix_fallocate(3): where the file system cannot do it glibc writes instead, and overwrites what other threads write meanwhile.
    """
    _call_fallocate(fd, _KEEP_SIZE if keep_size else 0, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the range's space back; it reads as zeroes then. Never changes the file's size. Works on block devices that can unmap."""
    _call_fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeroes and keep or get space for it; the file grows to hold it."""
    _call_fallocate(fd, _ZERO_RANGE, offset, length)


def start_writing_out(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write the range's changed pages to the medium; returns before they are there, and promises nothing."""
    global _sync_file_range
    refuse_far(offset, length)
    if _sync_file_range is None:
        if not LINUX:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        import ctypes

        function = ctypes.CDLL(None, use_errno=True).sync_file_range
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        function.restype = ctypes.c_int
        _sync_file_range = function
    if _sync_file_range(fd, offset, length, _SYNC_WRITE) != 0:
        import ctypes

        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ioctl(fd: int, request: int, argument: Any) -> Any:
    if not LINUX:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    import fcntl

    return fcntl.ioctl(fd, request, argument)


def device_sector_size(fd: int) -> int:
    """Return the logical sector size of a block device in bytes."""
    (size,) = struct.unpack("i", _ioctl(fd, _BLKSSZGET, bytes(struct.calcsize("i"))))
    return int(size)


def device_is_read_only(fd: int) -> bool:
    """Tell whether a block device was set to read-only (``blockdev --setro``), which opening it for writing does not reveal."""
    return bool(struct.unpack("i", _ioctl(fd, _BLKROGET, bytes(struct.calcsize("i"))))[0])


def discard_device(fd: int, offset: int, length: int) -> None:
    """Tell a block device that the range, whole sectors, is no longer needed; what it reads as then is the device's business."""
    refuse_far(offset, length)
    _ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length))


def zero_device(fd: int, offset: int, length: int) -> None:
    """Make a range of whole sectors of a block device read as zeroes; the kernel writes them where the device has no better way."""
    refuse_far(offset, length)
    _ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))


def clone_range(source: int, source_offset: int, length: int, target: int, target_offset: int) -> None:
    """Let *target* share the blocks of *source* (reflink): offsets and length are multiples of the file system's block, length 0 is "to the end".

    Raises OSError: ENOTSUP or EXDEV where blocks cannot be shared, EINVAL where the range is not aligned.
    """
    refuse_far(source_offset, length)
    refuse_far(target_offset, length)
    _ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, source_offset, length, target_offset))


def copy_range(source: int, source_offset: int, length: int, target: int, target_offset: int) -> int:
    """Copy up to *length* bytes inside the kernel and return how many; 0 at the end of *source*. The descriptors' positions do not move."""
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    refuse_far(source_offset, length)
    refuse_far(target_offset, length)
    return os.copy_file_range(source, target, length, source_offset, target_offset)


def set_nocow(fd: int) -> None:
    """Turn copy-on-write off for an empty file (Btrfs), so that a disk image in it does not fragment."""
    (flags,) = struct.unpack("l", _ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))
    _ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", flags | _NOCOW_FLAG))


def set_extent_size_hint(fd: int, length: int) -> None:
    """Ask the file system (XFS) to allocate an empty file's space in pieces of *length* bytes."""
    attributes = bytearray(_ioctl(fd, _FS_IOC_FSGETXATTR, bytes(28)))
    (flags,) = struct.unpack_from("=I", attributes, 0)
    struct.pack_into("=II", attributes, 0, flags | _XFLAG_EXTSIZE, length)
    _ioctl(fd, _FS_IOC_FSSETXATTR, bytes(attributes))

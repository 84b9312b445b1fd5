"""Files and block devices of the host: the drivers "file" and "host_device".

Sources: open(2), preadv(2), fallocate(2), fdatasync(2); QEMU's ``BlockdevOptionsFile`` for options, ``docs/tools/qemu-img`` for cache modes.

Cache modes are made of three switches: ``cache.direct`` opens with O_DIRECT, ``cache.no-flush`` makes flushes do nothing (both here), and
write-through is the disk above asking FUA of every write. A flush is fdatasync(2).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.node import (
    READ,
    WRITE_REQUEST,
    BlockNode,
    Capabilities,
    Limits,
    Request,
    Run,
    Zeroing,
)
from cowhand.block.options import NodeOptions, option
from cowhand.block.protocols import file_syscalls
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer, fill_zero, give, take
from cowhand.core.errors import CowhandError, InvalidArgument, IOFailed, NotSupported, Poisoned, from_os_error
from cowhand.core.extents import ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.imagelock import Holder
    from cowhand.block.opening import Opening

_DIRECT = getattr(os, "O_DIRECT", 0)
_DSYNC = getattr(os, "RWF_DSYNC", 0)
_preadv = file_syscalls.preadv
_pwritev = file_syscalls.pwritev

#: The kernel takes at most so many buffers in one call (IOV_MAX).
MAX_BUFFERS = 1024
#: Unaligned memory is copied through aligned memory in pieces of this size.
BOUNCE_SIZE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions(NodeOptions):
    """Options of "file" and "host_device"."""

    filename: str | None = option(help="path of the file or device")
    aio: str = option(
        "threads", choices=("threads", "native", "io_uring"), help="accepted; requests are system calls", strong=False
    )
    locking: str = option("auto", choices=("auto", "on", "off"), help="image locks", strong=False)
    drop_cache: bool = option(True, kind="bool", help="accepted; for migration", strong=False)
    x_check_cache_dropped: bool = option(False, kind="bool", help="accepted; for migration tests", strong=False)


class FileNode(BlockNode):
    """A regular file.

    ``fd`` is its descriptor, which the fast lane may use with explicit offsets. ``size`` is asked of the system each time, so that writes by way of
    the descriptor count. After a failed flush nobody knows what is on the medium: the node then refuses every change until it is opened again.
    """

    driver: ClassVar[str] = "file"
    options_class: ClassVar[type[NodeOptions]] = FileOptions
    options: FileOptions
    is_device: ClassVar[bool] = False

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self.path = options.filename or ""
        self.fd = -1
        self.direct = options.cache_direct
        self._holder: Holder | None = None
        self._failure: int | None = None  #: errno of the flush that failed
        self._can_punch = self._can_zero = self._can_dsync = True

    @classmethod
    def open(cls, opening: Opening | None, options: NodeOptions, given: dict[str, Any]) -> FileNode:
        assert isinstance(options, FileOptions)
        if not options.filename:
            raise InvalidArgument("The 'file' block driver requires a file name")
        if options.aio == "native" and not options.cache_direct:
            raise InvalidArgument(
                "aio=native was specified, but it requires cache.direct=on, which was not specified."
            )
        node = cls(options)
        try:
            node._open()
        except BaseException:
            node.close()
            raise
        return node

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        return {"filename": filename.removeprefix(cls.driver + ":")}

    @classmethod
    def create(cls, filename: str, size: int, **settings: Any) -> None:
        """Make a file; settings and errors are those of :func:`cowhand.block.protocols.file_space.create_file`."""
        from cowhand.block.protocols.file_space import create_file

        create_file(filename.removeprefix(cls.driver + ":"), size, **settings)

    # -- opening

    def _open(self) -> None:
        if not self.writable or not self.options.auto_read_only:
            self.fd = self._open_descriptor(self.writable)
        else:
            try:
                self.fd = self._open_descriptor(True)
            except CowhandError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                self.writable = False
                self.fd = self._open_descriptor(False)
        self._take_holder()
        self._measure()

    def _open_descriptor(self, writable: bool) -> int:
        # O_NONBLOCK: opening a fifo, which is refused below, must not wait for its other end.
        flags = os.O_RDWR if writable else os.O_RDONLY
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        fd = -1
        try:
            self._check_kind(os.stat(self.path).st_mode)  # before opening: a device may act on that alone
            if self.direct and not _DIRECT:
                raise NotSupported("this system has no direct I/O (cache.direct=on)", path=self.path)
            fd = os.open(self.path, flags | (_DIRECT if self.direct else 0))
            self._check_kind(os.fstat(fd).st_mode)
            if hasattr(os, "set_blocking"):
                os.set_blocking(fd, True)
            self._check_writable(fd, writable)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raised = from_os_error(error, self.path, doing="opening")
            if self.direct and error.errno == errno.EINVAL:
                raised.hint = "The file system may not support direct I/O; try cache.direct=off."
            raise raised.within(qemu=f"Could not open '{self.path}'") from error
        except ValueError as error:
            if fd >= 0:
                os.close(fd)
            if isinstance(error, CowhandError):
                raise
            raise InvalidArgument("a file name cannot contain a zero byte") from error
        except CowhandError:
            if fd >= 0:
                os.close(fd)
            raise
        return fd

    def _check_kind(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise InvalidArgument(f"'{self.driver}' driver requires '{self.path}' to be a regular file", path=self.path)

    def _check_writable(self, fd: int, writable: bool) -> None:
        """Raise OSError where the descriptor, though opened for writing, cannot be written."""

    def _take_holder(self) -> None:
        if self.options.locking == "off" or self.options.force_share:
            return
        from cowhand.block import imagelock

        try:
            self._holder = imagelock.hold(self.fd, self.path, f"node '{self.name}'")
        except NotSupported:
            if self.options.locking == "on":
                raise

    def _measure(self) -> None:
        block = 1
        if self.direct:
            from cowhand.block.protocols.file_alignment import probe

            block = probe(self.fd, self.path, device=self.is_device)
        self.limits = Limits(request_alignment=block, memory_alignment=block)
        self.capabilities = Capabilities(
            writable=self.writable,
            zeroes=Zeroing.NATIVE if file_syscalls.LINUX else Zeroing.EMULATED,
            discard=file_syscalls.LINUX and self.options.discard != "ignore",
            fua=True,
            resizable=not self.is_device,
        )

    def set_writable(self, writable: bool) -> None:
        """Open the same path anew for writing, or for reading only, behind the same descriptor number; locks and requests in flight stay.

        Raises as opening does, and IOFailed when the path now names another file; then nothing has changed.
        """
        if writable == self.writable:
            return
        fd = self._open_descriptor(writable)
        try:
            if not os.path.sameopenfile(fd, self.fd):
                raise IOFailed("the file was replaced by another one", path=self.path, errno=errno.ESTALE)
            os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)
        self.writable = writable
        self.capabilities = self.capabilities._replace(writable=writable)

    def update_permissions(self, perm: int, shared: int) -> None:
        holder = self._holder
        if holder is None:
            return
        try:
            holder.update(perm, shared)
        except NotSupported:
            # A file that is only read does no harm without locks; for writing the user has to say that it is alone.
            if self.writable or self.options.locking == "on":
                raise
            holder.release()
            self._holder = None

    # -- facts

    @property
    def size(self) -> int:
        try:
            return file_syscalls.end_of(self.fd)
        except OSError as error:
            raise self._failed(error, "asking for the size") from error

    @property
    def filename(self) -> str:
        return self.path

    def allocated_size(self) -> int | None:
        found = os.fstat(self.fd)
        return found.st_blocks * 512 if hasattr(found, "st_blocks") else None

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        from cowhand.block.protocols.file_space import add_extents

        batch = ExtentBatch()
        add_extents(batch, self.fd, self, offset, length)
        return batch

    def host_file(self, run: Run) -> tuple[int, int] | None:
        # With direct I/O only for whole blocks: the engine's pieces and buffers are aligned when the run is.
        block = self.limits.request_alignment
        if self._failure is not None or (run[0] | run[3]) % block:
            return None
        return self.fd, run[3]

    def _failed(self, error: OSError, doing: str, offset: int | None = None) -> CowhandError:
        raised = from_os_error(error, self.path, doing=doing)
        if raised.offset is None:
            raised.offset = offset
        return raised

    # -- reading

    def read_into(self, offset: int, buffer: Buffer) -> None:
        try:
            done = _preadv(self.fd, (buffer,), offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise self._failed(error, "reading", offset) from error
            done = 0
        if done != len(buffer):
            self._read_rest(offset, memoryview(buffer), done)

    def _read_rest(self, offset: int, view: memoryview, done: int) -> None:
        """Go on behind *done* bytes: after a short read, at the end of the file, or with unaligned memory under direct I/O."""
        length = len(view)
        while done < length:
            try:
                if self.direct:
                    count = self._read_bounced(offset + done, view[done:])
                else:
                    count = _preadv(self.fd, (view[done:],), offset + done)
            except OSError as error:
                raise self._failed(error, "reading", offset + done) from error
            done += count
            if count == 0:
                if offset + done < self.size:
                    raise IOFailed("reading failed: no bytes where there should be some", path=self.path, offset=offset + done)
                fill_zero(view[done:])
                return

    def _read_bounced(self, offset: int, view: memoryview) -> int:
        """Read at any offset into any memory by way of aligned memory; return how many bytes, 0 at the end of the file."""
        block = self.limits.request_alignment
        head = offset % block
        whole = min(BOUNCE_SIZE, -(-(head + len(view)) // block) * block)
        bounce = take(whole)
        try:
            got = _preadv(self.fd, (bounce,), offset - head)
            count = max(0, min(got - head, len(view)))
            view[:count] = bounce[head : head + count]
        finally:
            give(bounce)
        return count

    # -- writing

    def _refuse_poisoned(self) -> None:
        raise Poisoned(
            "an earlier flush failed, so it is not known what is on the medium",
            hint="Open the image again, and check it, before it is written to.",
            errno=self._failure,
            path=self.path,
        )

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        if fua or self._failure is not None or len(buffers) > MAX_BUFFERS:
            self._write_special(offset, buffers, fua)
            return
        try:
            done = _pwritev(self.fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise self._failed(error, "writing", offset) from error
            done = 0
        if done != (len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))):
            self._write_rest(offset, buffers, done)

    def _write_special(self, offset: int, buffers: Sequence[Buffer], fua: bool) -> None:
        if self._failure is not None:
            self._refuse_poisoned()
        if fua and not self.options.cache_no_flush:
            if not (_DSYNC and self._can_dsync) or len(buffers) > MAX_BUFFERS:
                self._write_special(offset, buffers, False)
                self.flush()
            else:
                self._write_stable(offset, buffers)
            return
        for first in range(0, len(buffers), MAX_BUFFERS):
            part = buffers[first : first + MAX_BUFFERS]
            self.write(offset, part)
            offset += sum(map(len, part))

    def _write_stable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write with RWF_DSYNC: only these bytes wait for the medium, not everything that the file has in the page cache."""
        try:
            done = _pwritev(self.fd, buffers, offset, _DSYNC)
        except OSError as error:
            misaligned = error.errno == errno.EINVAL and self.direct
            if misaligned or file_syscalls.is_unsupported(error):
                self._can_dsync = misaligned
                self.write(offset, buffers)
                self.flush()
                return
            if error.errno == errno.EIO:
                self._failure = errno.EIO  # the page cache may now call clean what never reached the medium
            raise self._failed(error, "writing", offset) from error
        if done != sum(map(len, buffers)):
            self._write_rest(offset, buffers, done)
            self.flush()

    def _write_rest(self, offset: int, buffers: Sequence[Buffer], done: int) -> None:
        """Go on behind *done* bytes: after a short write, or with unaligned memory under direct I/O."""
        pieces = self._bounced(buffers, done) if self.direct else _behind(buffers, done)
        offset += done
        for view in pieces:
            while view:
                try:
                    count = _pwritev(self.fd, (view,), offset)
                except OSError as error:
                    raise self._failed(error, "writing", offset) from error
                if count == 0:
                    raise IOFailed("writing failed: no bytes were taken", path=self.path, offset=offset)
                offset += count
                view = view[count:]

    def _bounced(self, buffers: Sequence[Buffer], done: int) -> Iterator[memoryview]:
        """Yield what lies behind *done* bytes of *buffers*, copied to aligned memory, in pieces of BOUNCE_SIZE and a rest."""
        bounce = take(BOUNCE_SIZE)
        try:
            fill = 0
            for view in _behind(buffers, done):
                while view:
                    count = min(len(view), BOUNCE_SIZE - fill)
                    bounce[fill : fill + count] = view[:count]
                    fill += count
                    view = view[count:]
                    if fill == BOUNCE_SIZE:
                        yield bounce
                        fill = 0
            if fill:
                yield bounce[:fill]
        finally:
            give(bounce)

    def flush(self) -> None:
        if self._failure is not None:
            self._refuse_poisoned()
        if self.options.cache_no_flush:
            return
        try:
            _datasync(self.fd)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EINVAL) and not self.writable:
                return  # a medium that is only read has nothing to flush
            self._failure = error.errno or errno.EIO
            raise self._failed(error, "flushing") from error

    # -- zeroes and discards

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if self._failure is not None:
            self._refuse_poisoned()
        unmap = unmap and self.options.discard != "ignore"
        if not (unmap and self._punch_and_extend(offset, length)) and not self._zero_natively(offset, length):
            if not fallback:
                raise NotSupported("zeroes can only be written as bytes here", path=self.path, offset=offset)
            self._zero_bytes(offset, length)
        if fua:
            self.flush()

    def _attempt(self, call: Callable[[int, int, int], None], offset: int, length: int) -> bool | None:
        """Do *call*; tell whether it worked, None when the system does not have it at all. Raises when it failed."""
        try:
            call(self.fd, offset, length)
        except OSError as error:
            if file_syscalls.is_unsupported(error):
                return None
            if error.errno == errno.EINVAL:  # refused for this range: the bytes can still be written
                return False
            raise self._failed(error, "writing zeroes", offset) from error
        return True

    def _punch_and_extend(self, offset: int, length: int) -> bool:
        if not self._can_punch:
            return False
        done = self._attempt(file_syscalls.punch_hole, offset, length)
        self._can_punch = done is not None
        end = offset + length
        if not done:
            return False
        if end > self.size:
            # A hole never makes the file longer. Writing its last bytes does, without the race that fstat and ftruncate have.
            tail = min(length, self.limits.request_alignment)
            self.write(end - tail, (ZEROES[:tail],))
        return True

    def _zero_natively(self, offset: int, length: int) -> bool:
        if not self._can_zero:
            return False
        done = self._attempt(file_syscalls.zero_range, offset, length)
        self._can_zero = done is not None
        return bool(done)

    def _zero_bytes(self, offset: int, length: int) -> None:
        while length:
            count = min(length, ZEROES_SIZE)
            self.write(offset, (ZEROES[:count],))
            offset += count
            length -= count

    def discard(self, offset: int, length: int) -> None:
        if self._failure is not None:
            self._refuse_poisoned()
        if self.options.discard == "ignore" or not self._can_punch:
            return
        self._can_punch = self._attempt(file_syscalls.punch_hole, offset, length) is not None

    # -- many at once

    def submit(self, batch: Sequence[Request]) -> None:
        failure: CowhandError | None = None
        index, count = 0, len(batch)
        while index < count:
            kind, offset, what = batch[index]
            index += 1
            try:
                if kind == READ:
                    if index < count and batch[index][1] == offset + len(what) and batch[index][0] == READ:
                        index = self._read_run(batch, index - 1)
                    elif _preadv(self.fd, (what,), offset) != len(what):
                        self.read_into(offset, what)
                elif kind == WRITE_REQUEST:
                    if index < count and batch[index][1] == offset + len(what) and batch[index][0] == WRITE_REQUEST:
                        start, (index, buffers) = offset, _adjacent(batch, index - 1)
                        self.write(start, buffers)
                    else:
                        self.write(offset, (what,))
                else:
                    super().submit(((kind, offset, what),))
            except CowhandError as error:
                failure = failure or error
            except OSError as error:
                # Once more by the way that knows what to do about it.
                failure = self._read_again(offset, what, error, failure)
        if failure is not None:
            raise failure

    def _read_run(self, batch: Sequence[Request], first: int) -> int:
        """Read requests that lie side by side in one call; return the index of the next one."""
        offset = batch[first][1]
        index, buffers = _adjacent(batch, first)
        try:
            done = _preadv(self.fd, buffers, offset)
        except OSError:
            done = -1
        if done != batch[index - 1][1] + len(batch[index - 1][2]) - offset:
            super().submit(batch[first:index])
        return index

    def _read_again(self, offset: int, what: Buffer, error: OSError, failure: CowhandError | None) -> CowhandError | None:
        try:
            self.read_into(offset, what)
        except CowhandError as again:
            return failure or again.with_traceback(error.__traceback__)
        return failure

    # -- life

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        from cowhand.block.protocols.file_space import set_size

        if self._failure is not None:
            self._refuse_poisoned()
        if size < self.size and not shrink:
            raise InvalidArgument("the file would be cut shorter, which was not allowed", path=self.path)
        set_size(self.fd, size, preallocation, self.path)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        holder, self._holder = self._holder, None
        try:
            if fd >= 0:
                os.close(fd)
        except OSError as error:
            raise self._failed(error, "closing") from error
        finally:
            if holder is not None:
                holder.release()


class HostDeviceNode(FileNode):
    """A block device of the host (a character device is taken as well, as QEMU does)."""

    driver: ClassVar[str] = "host_device"
    is_device: ClassVar[bool] = True

    def _check_kind(self, mode: int) -> None:
        if not stat.S_ISBLK(mode) and not stat.S_ISCHR(mode):
            raise InvalidArgument(
                f"'{self.driver}' driver requires '{self.path}' to be either a character or block device", path=self.path
            )

    def _check_writable(self, fd: int, writable: bool) -> None:
        try:
            read_only = writable and file_syscalls.device_is_read_only(fd)
        except OSError:
            return  # not a block device
        if read_only:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def _measure(self) -> None:
        super()._measure()
        try:
            sector = file_syscalls.device_sector_size(self.fd)
        except OSError:
            sector = 1
        self.limits = self.limits._replace(zero_alignment=sector, discard_alignment=sector)

    def allocated_size(self) -> int | None:
        return 0  # as QEMU tells of a device: none of the host's file systems' space

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if self._failure is not None:
            self._refuse_poisoned()
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
        done = self._attempt(file_syscalls.punch_hole, offset, length)
        self._can_punch = done is not None
        return bool(done)

    def _zero_natively(self, offset: int, length: int) -> bool:
        return super()._zero_natively(offset, length) or bool(self._attempt(file_syscalls.zero_device, offset, length))

    def discard(self, offset: int, length: int) -> None:
        if self._failure is not None:
            self._refuse_poisoned()
        sector = self.limits.discard_alignment
        begin = -(-offset // sector) * sector
        end = (offset + length) // sector * sector
        if begin < end and self.options.discard != "ignore":
            self._attempt(file_syscalls.discard_device, begin, end - begin)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if preallocation != "off":
            raise NotSupported(f"Preallocation mode '{preallocation}' unsupported for this non-regular file", path=self.path)
        current = self.size
        if size > current:
            raise InvalidArgument("Cannot grow device files", path=self.path)
        if size != current:
            raise NotSupported("Cannot resize device files", path=self.path)


#: macOS has no fdatasync, and its fsync does not reach the medium, but that is what there is without F_FULLFSYNC on every flush.
_datasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def _behind(buffers: Sequence[Buffer], done: int) -> Iterator[memoryview]:
    """Yield views of *buffers* without their first *done* bytes."""
    for buffer in buffers:
        view = memoryview(buffer)
        if done < len(view):
            yield view[done:]
        done = max(0, done - len(view))


def _adjacent(batch: Sequence[Request], first: int) -> tuple[int, list[Buffer]]:
    """Return the index behind the requests from *first* on that are of one kind and lie side by side, and their buffers."""
    kind, offset, what = batch[first]
    buffers = [what]
    end = offset + len(what)
    index = first + 1
    while index < len(batch) and len(buffers) < MAX_BUFFERS:
        next_kind, offset, what = batch[index]
        if next_kind != kind or offset != end:
            break
        buffers.append(what)
        end += len(what)
        index += 1
    return index, buffers

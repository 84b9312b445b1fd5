"""Files of the host: the driver "file".

Sources: open(2), preadv(2), fallocate(2), fdatasync(2); QEMU's ``BlockdevOptionsFile`` for options, ``docs/tools/qemu-img`` for cache modes.

Cache modes are made of three switches: ``cache.direct`` opens with O_DIRECT, ``cache.no-flush`` makes flushes do nothing (both here), and
write-through is the disk above asking FUA of every write. A flush is fdatasync(2).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.locking import device_use
from cowhand.block.node.node import ALL_PERMISSIONS, Capabilities, Limits, Reopening, Run, Zeroing
from cowhand.block.node.options import NodeOptions, option
from cowhand.block.protocols.file.data import DescriptorNode
from cowhand.core import syscalls
from cowhand.core.errors import CowhandError, InvalidArgument, IOFailed, NotSupported, from_os_error
from cowhand.core.extents import ExtentBatch
from cowhand.core.unfinished import is_unfinished

if TYPE_CHECKING:
    from cowhand.block.locking.image_lock import Holder
    from cowhand.block.opening.opening import Opening

_DIRECT = getattr(os, "O_DIRECT", 0)


class FileOptions(NodeOptions):
    """Options of "file" and "host_device"."""

    filename: str | None = option(help="path of the file or device")
    aio: str = option(
        "threads", choices=("threads", "native", "io_uring"), help="accepted; requests are system calls", strong=False
    )
    aio_max_batch: int = option(0, kind="int", help="accepted", strong=False)
    locking: str = option("auto", choices=("auto", "on", "off"), help="image locks", strong=False)
    drop_cache: bool = option(True, kind="bool", help="accepted; for migration", strong=False)
    pr_manager: str | None = option(help="refused: there is no manager of persistent reservations", strong=False)
    x_check_cache_dropped: bool = option(False, kind="bool", help="accepted; for migration tests", strong=False)


class _Exchange(Reopening):
    """Puts another descriptor in the place of the node's, where the mode or direct I/O changes; its number and the image locks stay."""

    node: FileNode

    def __init__(self, node: FileNode, options: FileOptions, writable: bool) -> None:
        super().__init__(node, options, writable)
        self._fresh = self._old = -1
        if (writable, options.cache_direct) != (node.writable, node.direct):
            node.flush_before_exchange()
            self._fresh = node.same_file(writable, options.cache_direct)
            self._old = os.dup(node.fd)

    def commit(self) -> None:
        super().commit()
        if self._fresh >= 0:
            os.dup2(self._fresh, self.node.fd, inheritable=False)

    def undo(self) -> None:
        super().undo()
        if self._old >= 0:
            os.dup2(self._old, self.node.fd, inheritable=False)

    def finish(self) -> None:
        for fd in (self._fresh, self._old):
            if fd >= 0:
                os.close(fd)


class FileNode(DescriptorNode):
    """A regular file.

    ``fd`` is its descriptor, which the fast lane may use with explicit offsets. ``size`` is asked of the system each time, so that writes by way of
    the descriptor count.
    """

    driver: ClassVar[str] = "file"
    immediate = True
    options_class: ClassVar[type[NodeOptions]] = FileOptions
    options: FileOptions
    is_device: ClassVar[bool] = False
    named_by_path: ClassVar[bool] = True

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options, options.filename or "")
        self._holder: Holder | None = None

    @classmethod
    def open(cls, opening: Opening | None, options: NodeOptions, given: dict[str, Any]) -> FileNode:
        assert isinstance(options, FileOptions)
        if not options.filename:
            raise InvalidArgument(f"The '{cls.driver}' block driver requires a file name")
        if options.aio == "native" and not options.cache_direct:
            raise InvalidArgument("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        if options.pr_manager is not None:
            raise InvalidArgument(f"No persistent reservation manager with id '{options.pr_manager}'")
        node = cls(options)
        try:
            node._open()
        except BaseException:
            node.close()
            raise
        return node

    changeable: ClassVar[frozenset[str]] = frozenset(("drop-cache", "x-check-cache-dropped"))

    def prepare_reopen(self, options: NodeOptions, writable: bool) -> Reopening:
        assert isinstance(options, FileOptions)
        if options.aio == "native" and not options.cache_direct:
            raise InvalidArgument("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        return _Exchange(self, options, writable)

    def refit(self) -> None:
        self.direct = self.options.cache_direct
        self._measure()
        if self.failure is not None:
            self.lane_fd = -1

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        return {"filename": filename.removeprefix(cls.driver + ":")}

    @classmethod
    def create(cls, filename: str, size: int, **settings: Any) -> None:
        """Make a file; settings and errors are those of :func:`cowhand.block.protocols.file.space.create_file`."""
        from cowhand.block.protocols.file.space import create_file

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

    def flush_before_exchange(self) -> None:
        """Flush: that what was written before could not be stored the system tells the descriptor it was written by, and no new one."""
        if self.writable and self.failure is None:
            self.flush()

    def same_file(self, writable: bool, direct: bool) -> int:
        """Return another descriptor of the file that is open. Raises as opening does, and IOFailed when the path now names another file."""
        before, self.direct, path = self.direct, direct, self.path
        if syscalls.LINUX and not os.path.lexists(path) and not os.fstat(self.fd).st_nlink:
            self.path = f"/proc/self/fd/{self.fd}"  # it has no name any more (a temporary overlay)
        try:
            fd = self._open_descriptor(writable)
        finally:
            self.direct, self.path = before, path
        if not os.path.sameopenfile(fd, self.fd):
            os.close(fd)
            raise IOFailed("the file was replaced by another one", path=self.path, errno=errno.ESTALE)
        return fd

    def _open_descriptor(self, writable: bool) -> int:
        # O_NONBLOCK: opening a fifo, which is refused below, must not wait for its other end.
        flags = os.O_RDWR if writable else os.O_RDONLY
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        fd = -1
        if self.path.startswith("/dev/fdset/"):
            raise NotSupported(
                "sets of descriptors belong to a monitor, and there is none here",
                qemu=f"Could not dup FD for {self.path} flags {(flags & os.O_ACCMODE) | (_DIRECT if self.direct else 0):x}: "
                "Function not implemented", path=self.path,
            )  # fmt: skip
        try:
            mode = os.stat(self.path).st_mode
            if not writable or not stat.S_ISDIR(mode):  # the system says best that a folder cannot be written
                self._check_kind(mode)  # before opening: a device may act on that alone
            if writable:
                device_use.check(self.path)
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
        if stat.S_ISSOCK(mode):
            raise InvalidArgument(
                f"'{self.path}' is a socket, which holds no image",
                qemu=f"Could not open '{self.path}': {os.strerror(errno.ENXIO)}", errno=errno.ENXIO, path=self.path,
            )  # fmt: skip
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
            raise InvalidArgument(
                f"'{self.path}' is {kind}, and driver '{self.driver}' opens regular files only",
                qemu=f"'{self.driver}' driver requires '{self.path}' to be a regular file", path=self.path,
            )  # fmt: skip

    def _check_writable(self, fd: int, writable: bool) -> None:
        """Raise OSError where the descriptor, though opened for writing, cannot be written."""

    def _take_holder(self) -> None:
        if self.options.locking == "off":
            return
        from cowhand.block.locking import image_lock

        try:
            self._holder = image_lock.hold(self.fd, self.path, f"node '{self.name}'")
        except NotSupported:
            if self.options.locking == "on":
                raise

    def _measure(self) -> None:
        block = 1
        if self.direct:
            from cowhand.block.protocols.file.alignment import probe

            block = probe(self.fd, self.path, device=self.is_device)
        self.limits = Limits(request_alignment=block, memory_alignment=block)
        # Direct I/O wants aligned memory, which users of the descriptor do not promise.
        self.lane_fd = -1 if self.direct else self.fd
        self.capabilities = Capabilities(
            writable=self.writable,
            zeroes=Zeroing.NATIVE if syscalls.LINUX else Zeroing.EMULATED,
            discard=syscalls.LINUX and self.options.discard != "ignore",
            fua=True,
            resizable=not self.is_device,
        )

    def set_writable(self, writable: bool) -> None:
        """Open the same path anew for writing, or for reading only, behind the same descriptor number; locks and requests in flight stay.

        Raises as opening does, and IOFailed when the path now names another file; then nothing has changed.
        """
        if writable == self.writable:
            return
        self.flush_before_exchange()
        fd = self.same_file(writable, self.direct)
        try:
            os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)
        self.writable = writable
        self.capabilities = self.capabilities._replace(writable=writable)

    def update_permissions(self, perm: int, shared: int) -> None:
        holder = self._holder
        if holder is None:
            return
        if self.options.force_share:
            shared = ALL_PERMISSIONS  # what is used is still told to others, as QEMU does
        try:
            holder.update(perm, shared)
        except NotSupported:
            # A file that is only read does no harm without locks, and one that is being made nobody else knows; for writing the user has to say
            # that it is alone.
            from cowhand.block.locking import image_lock

            alone = not self.writable or is_unfinished(self.path) or image_lock.are_missing_locks_allowed()
            if not alone or self.options.locking == "on":
                raise
            holder.release()
            self._holder = None

    # -- facts

    def allocated_size(self) -> int | None:
        found = os.fstat(self.fd)
        return found.st_blocks * 512 if hasattr(found, "st_blocks") else None

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        from cowhand.block.protocols.file.space import add_extents

        batch = ExtentBatch()
        add_extents(batch, self.fd, self, offset, length)
        return batch

    def host_file(self, run: Run) -> tuple[int, int] | None:
        # With direct I/O only for whole blocks: the engine's pieces and buffers are aligned when the run is.
        block = self.limits.request_alignment
        if self.failure is not None or (run[0] | run[3]) % block:
            return None
        return self.fd, run[3]

    # -- life

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        from cowhand.block.protocols.file.space import set_size

        if self.failure is not None:
            self.refuse_poisoned()
        if size < self.size and not shrink:
            raise InvalidArgument("the file would be cut shorter, which was not allowed", path=self.path)
        set_size(self.fd, size, preallocation, self.path, flush=lambda _: self.flush())

    def extend(self, size: int, limit: int) -> None:
        if self.failure is not None:
            self.refuse_poisoned()
        have = self.size
        if have >= size:
            return
        try:
            # Cuts nothing off that another thread has written since, as ftruncate(2) to this length might.
            syscalls.allocate(self.fd, have, size - have)
        except (
            OSError
        ):  # the file system cannot, or has no space: a hole does as well, behind all that is being written
            self.resize(max(size, limit))

    def close(self) -> None:
        fd, self.fd, self.lane_fd = self.fd, -1, -1
        holder, self._holder = self._holder, None
        try:
            if fd >= 0:
                os.close(fd)
        except OSError as error:
            raise self._failed(error, "closing") from error
        finally:
            if holder is not None:
                holder.release()

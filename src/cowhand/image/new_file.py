"""A new file that appears under its name only when it is complete, also in the place of another one.

It is made under a temporary name in the same folder. A new name is given by link(2), which never replaces a file that is already there
(renameat2(2) with RENAME_NOREPLACE does it on file systems without links); a file that may be replaced keeps its name, and its content, until
rename(2) exchanges it for the new one, which is complete and stable by then.

What a killed process leaves behind has a name of its own kind (``core/unfinished``); ``image/leftovers`` removes it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from cowhand.core.errors import CowhandError, ImageExists, InvalidArgument, from_os_error
from cowhand.core.unfinished import ASIDE, SUFFIX, being_made, is_unfinished, temporary_name

if TYPE_CHECKING:
    from cowhand.block.locking.image_lock import Holder

SECTOR = 512
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class NewFile:
    """The way of one file from a temporary name to *path*, made empty at once. As a context manager it removes the temporary file unless
    :meth:`appear` was called; so does an object that nobody holds any more, whatever interrupt came in between.

    With *replace* an existing *path* is replaced by :meth:`appear`. It is locked until then, as whoever writes an image locks it, and the new
    file is given its mode, owner and extended attributes where the system allows. A symbolic link goes on leading to what has its place then.

    ``temporary`` is the name under which the content is written; ``descriptor`` is open for writing. Raises ImageExists at once when *path*
    exists and is not to be replaced; ImageInUse and AccessDenied when it may not be; CannotReplace when only writing in place does it. Used by
    one thread.
    """

    def __init__(self, path: str, *, replace: bool = False) -> None:
        self._open = False
        self.descriptor = -1
        self._holder: Holder | None = None
        self._old = -1
        self._aside: str | None = None
        self.given = path
        self.path = os.path.realpath(path) if replace else path
        self.replaces = os.path.lexists(self.path)
        if self.replaces and not replace:
            raise _exists(path)
        self.temporary = temporary_name(self.path)
        try:
            if self.replaces:
                self._hold_old()
            self._make()
        except BaseException:
            self.discard()
            raise

    # -- making

    def _hold_old(self) -> None:
        """Lock the file that is to be replaced: it shall not be changed, nor be in use, when its name goes to another one."""
        from cowhand.block.locking.image_lock import hold
        from cowhand.block.node.node import ALL_PERMISSIONS, RESIZE, WRITE
        from cowhand.core.errors import NotSupported

        try:
            # Whoever may not write a file may not replace it either, although the folder would allow that.
            self._old = os.open(self.path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raised = from_os_error(error, self.given, doing="opening for writing")
            raise raised.within(qemu=f"Could not create '{self.given}'") from error
        try:
            self._holder = hold(self._old, self.given, "what is being replaced")
            self._holder.update(WRITE | RESIZE, ALL_PERMISSIONS & ~(WRITE | RESIZE))
        except NotSupported:
            pass  # no locks here: then nobody can be asked

    def _make(self) -> None:
        from cowhand.image.leftovers import hold_mark
        from cowhand.image.replacing import adopt

        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._open = True
        while True:
            being_made[self.temporary] = self.path
            try:
                self.descriptor = os.open(self.temporary, flags, 0o600 if self.replaces else 0o644)
            except ValueError as error:  # a NUL in the name
                raise InvalidArgument("a file name cannot contain a zero byte") from error
            except OSError as error:
                raised = from_os_error(error, self.given, doing="creating")
                raise raised.within(qemu=f"Could not create '{self.given}'") from error
            if hold_mark(self.descriptor, self.temporary):
                break
            # Between the two steps another process took it for something left behind.
            os.close(self.descriptor)
            being_made.pop(self.temporary, None)
            self.temporary = temporary_name(self.path)
        if self.replaces:
            adopt(self._old, self.descriptor, self.given)

    # -- the end

    def round_up(self, unit: int = SECTOR) -> None:
        """Let the file end on a whole *unit*, as importers of images and direct I/O ask for."""
        try:
            size = os.fstat(self.descriptor).st_size
            if size % unit:
                os.ftruncate(self.descriptor, size + -size % unit)
        except OSError as error:
            raise from_os_error(error, self.path, doing="finishing the new file") from error

    def sync(self) -> None:
        """Make the content stable. Raises IOFailed and its like."""
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise from_os_error(error, self.path, doing="storing the new file") from error

    def stand_aside(self) -> None:
        """Move the file that is to be replaced out of the way, to come back if this one does not appear: its content fits nothing any more."""
        if self.replaces:
            self._aside = self.temporary.removesuffix(SUFFIX) + ASIDE
            os.rename(self.path, self._aside)

    def appear(self, *, durable: bool = False) -> None:
        """Give the complete file its name. With *durable* the name, too, survives a power cut (the content is the writer's to flush).

        What replaces another file is stable before it does, *durable* or not. Raises ImageExists when somebody was quicker; the temporary file
        stays for :meth:`discard` then.
        """
        try:
            if self.replaces:
                self.sync()
                os.rename(self.temporary, self.path)
            else:
                try:
                    os.link(self.temporary, self.path)
                    os.unlink(self.temporary)
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    _rename_exclusively(self.temporary, self.path)
            self._open = False
            if self._aside is not None:
                with suppress(FileNotFoundError):
                    os.unlink(self._aside)
                self._aside = None
            if durable or self.replaces:
                _sync_folder(os.path.dirname(self.path) or ".")
        except FileExistsError:
            raise _exists(self.given) from None
        except OSError as error:
            raise from_os_error(error, self.given, doing="giving the new file its name") from error
        self._release()

    def discard(self) -> None:
        """Remove what was made so far; nothing happens when the file has appeared or was never begun."""
        try:
            if self._aside is not None:
                os.rename(self._aside, self.path)
                self._aside = None
            if self._open:
                self._open = False
                with suppress(FileNotFoundError):
                    os.unlink(self.temporary)
        except OSError as error:
            raise from_os_error(error, self.temporary, doing="removing the unfinished file") from error
        finally:
            self._release()

    def _release(self) -> None:
        being_made.pop(self.temporary, None)
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.release()
        for name in ("descriptor", "_old"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)

    def rename_in(self, error: CowhandError) -> CowhandError:
        """Let *error*, which may tell of the temporary name, tell of the one that the user knows."""
        old, new = self.temporary, self.given
        error.message = error.message.replace(old, new)
        error.qemu_message = error.qemu_message.replace(old, new)
        if error.path is not None:
            error.path = error.path.replace(old, new)
        error.frames = [tuple(part and part.replace(old, new) for part in frame) for frame in error.frames]  # type: ignore[misc]
        return error

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.discard()
        except CowhandError as second:
            if error is None:
                raise
            error.add_note(str(second))
        if isinstance(error, CowhandError):
            self.rename_in(error)

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            with suppress(CowhandError):
                self.discard()


def write_whole(path: str, content: bytes, *, replace: bool = False, doing: str = "writing") -> None:
    """Write *content* to the file *path*, which holds all of it, or what it held before; with *replace* in the place of another file.

    Where that one cannot be replaced (a device, several names) it is written in place. Raises ImageExists, IOFailed and its like.
    """
    from cowhand.image.replacing import reason_for_place

    try:
        if replace and os.path.lexists(path) and reason_for_place(path) is not None:
            with open(path, "wb") as plain:
                plain.write(content)
            return
        with NewFile(path, replace=replace) as file:
            with open(file.descriptor, "wb", closefd=False) as stream:
                stream.write(content)
            file.sync()
            file.appear(durable=True)
    except OSError as error:
        raise from_os_error(error, path, doing=doing) from error


def discard_all() -> None:
    """Remove every file that this process is making: for a process that leaves at once, whatever its threads are doing."""
    for name in tuple(being_made):
        with suppress(OSError):
            os.unlink(name)


def _exists(path: str) -> ImageExists:
    return ImageExists(f"'{path}' exists already", path=path, hint="Choose another name, or insist on overwriting it.")


def _rename_exclusively(old: str, new: str) -> None:
    try:
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        rename = library.renameat2
    except (ImportError, OSError, AttributeError):
        rename = None
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), new)
    # Neither links nor an exclusive rename: look, then leap.
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(old, new)


def _sync_folder(folder: str) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return  # systems where a folder cannot be opened
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


__all__ = ["SECTOR", "SUFFIX", "NewFile", "discard_all", "is_unfinished", "write_whole"]

"""A new file that appears under its name only when it is complete.

It is made under a temporary name in the same folder and then linked to its own name, which never replaces a file that is already there
(link(2) refuses; so does renameat2(2) with RENAME_NOREPLACE, for file systems without links). What a killed process leaves behind
has a name of the form ``.NAME.0123abcd.cowhand-new``: it belongs to nobody and may be deleted.
"""

from __future__ import annotations

import errno
import os
from types import TracebackType

from cowhand.core import clock
from cowhand.core.errors import CowhandError, ImageExists, from_os_error

#: Ends the name of every temporary file.
SUFFIX = ".cowhand-new"
_NAME_MAX = 255
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class NewFile:
    """The way of one file from a temporary name to *path*. As a context manager it removes the temporary file unless :meth:`appear` was called.

    The file itself is made by whoever writes it, under ``temporary``. Raises ImageExists at once when *path* exists. Used by one thread.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        folder, name = os.path.split(path)
        mark = "." + clock.random_bytes(4).hex() + SUFFIX
        # Cut in bytes, since that is what the limit counts.
        kept = os.fsencode(name)[: _NAME_MAX - len(mark) - 1]
        self.temporary = os.path.join(folder, "." + os.fsdecode(kept) + mark)
        self._open = True
        if os.path.lexists(path):
            raise _exists(path)

    def appear(self, *, durable: bool = False) -> None:
        """Give the complete file its name. With *durable* the name, too, survives a power cut (the content is the writer's to flush).

        Raises ImageExists when somebody was quicker; the temporary file stays for :meth:`discard` then.
        """
        try:
            try:
                os.link(self.temporary, self.path)
                os.unlink(self.temporary)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                _rename_exclusively(self.temporary, self.path)
            self._open = False
            if durable:
                _sync_folder(os.path.dirname(self.path) or ".")
        except FileExistsError:
            raise _exists(self.path) from None
        except OSError as error:
            raise from_os_error(error, self.path, doing="giving the new file its name") from error

    def discard(self) -> None:
        """Remove what was made so far; nothing happens when the file has appeared or was never begun."""
        if self._open:
            self._open = False
            try:
                os.unlink(self.temporary)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise from_os_error(error, self.temporary, doing="removing the unfinished file") from error

    def rename_in(self, error: CowhandError) -> CowhandError:
        """Let *error*, which may tell of the temporary name, tell of the one that the user knows."""
        old, new = self.temporary, self.path
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


def is_unfinished(name: str) -> bool:
    """Tell whether *name* is that of a file which a killed process left unfinished, or another one is making just now."""
    return os.path.basename(name).startswith(".") and name.endswith(SUFFIX)


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

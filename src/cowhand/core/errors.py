"""Errors with a stable code, an errno, frames of context, and two renderings.

``str(error)`` is for people: what happened, where, and what to do next. ``error.qemu()`` is the same event in the words and the
nesting of QEMU's tools ("Could not open 'X': Could not open backing file: ..."), which their tests and many scripts compare.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any


class CowhandError(Exception):
    """Everything that cowhand raises on purpose.

    ``code`` is stable and unique for each class; ``exit_code`` is what the ``cowhand`` command ends with; ``errno`` is part of the contract
    (it is what an export or a QMP reply reports). ``message`` is one sentence, ``hint`` what to do (or None), ``path`` and ``offset`` say where (or
    None), ``facts`` has further values by name, and ``frames`` the context, innermost first.
    """

    code = "error"
    exit_code = 1
    qmp_class = "GenericError"
    default_errno = _errno.EINVAL
    errno: int | None  #: never None here; the type is that of OSError, which some subclasses are too

    def __init__(
        self,
        message: str,
        *,
        qemu: str | None = None,
        hint: str | None = None,
        errno: int | None = None,
        path: str | None = None,
        offset: int | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.qemu_message = qemu if qemu is not None else message
        self.hint = hint
        self.errno = errno if errno is not None else self.default_errno
        self.path = path
        self.offset = offset
        self.facts: dict[str, Any] = facts
        self.frames: list[tuple[str | None, str | None]] = []

    @property
    def number(self) -> int:
        """The errno, which is never missing here."""
        return self.errno if self.errno is not None else self.default_errno

    def within(self, where: str | None = None, *, qemu: str | None = None) -> CowhandError:
        """Add one frame of context around the error and return it: *where* for people, *qemu* for QEMU's rendering."""
        self.frames.append((where, qemu))
        return self

    def qemu(self) -> str:
        """Render the error as QEMU's tools do: outermost frame first, joined by colons."""
        parts = [frame for _, frame in reversed(self.frames) if frame]
        parts.append(self.qemu_message)
        return ": ".join(parts)

    def __str__(self) -> str:
        text = self.message
        where = []
        if self.path is not None and self.path not in text:
            where.append(str(self.path))
        if self.offset is not None:
            where.append(f"offset {self.offset:#x}")
        where.extend(frame for frame, _ in self.frames if frame)
        if where:
            text += " (" + ", ".join(where) + ")"
        if self.hint:
            text += f"\n  {self.hint}"
        return text


class InvalidArgument(CowhandError, ValueError):
    """The caller asked for something that has no meaning."""

    code = "invalid-argument"


class NotSupported(CowhandError):
    """The format, driver or system cannot do this."""

    code = "not-supported"
    default_errno = _errno.ENOTSUP


class ImageNotFound(CowhandError, FileNotFoundError):
    """A file, device or other source of an image does not exist."""

    code = "not-found"
    default_errno = _errno.ENOENT


class ImageExists(CowhandError, FileExistsError):
    """Something is already there, and it was not allowed to be replaced."""

    code = "exists"
    default_errno = _errno.EEXIST


class AccessDenied(CowhandError, PermissionError):
    """The system does not let this user at the file."""

    code = "access-denied"
    default_errno = _errno.EACCES


class PolicyRefused(CowhandError, PermissionError):
    """The opening policy forbids what an image asked to have opened."""

    code = "policy"
    default_errno = _errno.EPERM


class ReadOnly(CowhandError, PermissionError):
    """A change was asked of something that was opened, or can only be opened, for reading."""

    code = "read-only"
    default_errno = _errno.EACCES


class ImageInUse(CowhandError):
    """Another process or another user in this process holds the image in a way that excludes this one."""

    code = "in-use"
    exit_code = 5
    default_errno = _errno.EAGAIN


class PermissionConflict(CowhandError):
    """Two users of one node want what excludes the other."""

    code = "permission-conflict"
    default_errno = _errno.EPERM


class NodeBusy(CowhandError):
    """A job or an export relies on a node, and refuses the operation meanwhile."""

    code = "node-busy"
    exit_code = 5
    default_errno = _errno.EBUSY


class InvalidFormat(CowhandError):
    """The bytes are not what the format's specification allows."""

    code = "invalid-format"
    exit_code = 4


class UnsupportedFeature(InvalidFormat, NotSupported):
    """The image uses a feature that this driver refuses by name."""

    code = "unsupported-feature"
    default_errno = _errno.ENOTSUP


class ImageCorrupt(InvalidFormat):
    """Metadata of an image contradicts itself; nothing is written to such an image."""

    code = "corrupt"
    default_errno = _errno.EIO


class IOFailed(CowhandError, OSError):
    """The system could not read or write; ``errno`` says why."""

    code = "io"
    exit_code = 3
    default_errno = _errno.EIO


class NoSpace(IOFailed):
    """The file system or device is full."""

    code = "no-space"
    default_errno = _errno.ENOSPC


class OutOfRange(CowhandError, ValueError):
    """A request lies beyond the end of the disk."""

    code = "out-of-range"


class VerificationFailed(CowhandError):
    """Two copies that should be the same differ; whoever compares them does nothing more."""

    code = "verification-failed"
    default_errno = _errno.EIO


class Poisoned(CowhandError):
    """The node failed in a way that leaves its state unknown; it must be opened again. Nothing more is written."""

    code = "poisoned"
    default_errno = _errno.EIO


class Closed(CowhandError):
    """The disk or node was closed."""

    code = "closed"
    default_errno = _errno.EBADF


class Cancelled(CowhandError):
    """The operation was cancelled."""

    code = "cancelled"
    exit_code = 130
    default_errno = _errno.ECANCELED


class JobError(CowhandError):
    """A job cannot do, or be asked, what it was asked."""

    code = "job"


class SnapshotLost(CowhandError):
    """A moment that was kept beside a running disk could not be kept any longer."""

    code = "snapshot-lost"
    exit_code = 3
    default_errno = _errno.EIO


class DeadlineExceeded(CowhandError, TimeoutError):
    """The operation did not end in time."""

    code = "deadline"
    default_errno = _errno.ETIMEDOUT


class OverlaysExist(CowhandError):
    """Other images, or internal snapshots, read through this one, and what was asked would change what they show."""

    code = "has-overlays"
    exit_code = 9


class SearchIncomplete(CowhandError):
    """It could not be found out whether other images read through this one, or what it reads through."""

    code = "search-incomplete"
    exit_code = 9


class ChainLoop(InvalidArgument):
    """An image would read through itself."""

    code = "chain-loop"


class SnapshotNotFound(CowhandError, LookupError):
    """The image has no snapshot of that id or name."""

    code = "snapshot-not-found"
    default_errno = _errno.ENOENT


class BitmapNotFound(CowhandError, LookupError):
    """The node has no dirty bitmap of that name."""

    code = "bitmap-not-found"
    default_errno = _errno.ENOENT


class BitmapUnusable(CowhandError):
    """A dirty bitmap's state forbids what was asked: it is busy, read-only, inconsistent or broken."""

    code = "bitmap-unusable"
    default_errno = _errno.EINVAL


_BY_ERRNO: dict[int, type[CowhandError]] = {
    _errno.ENOENT: ImageNotFound,
    _errno.EEXIST: ImageExists,
    _errno.EACCES: AccessDenied,
    _errno.EPERM: AccessDenied,
    _errno.ENOSPC: NoSpace,
    _errno.EDQUOT: NoSpace,
}


def from_os_error(error: OSError | OverflowError, path: str | None = None, *, doing: str | None = None) -> CowhandError:
    """Turn an ``OSError`` of the system into the matching :class:`CowhandError`; errno and message are kept.

    *doing* ("reading", "opening") begins the message for people. An ``OverflowError`` is an offset that the system cannot express.
    """
    if isinstance(error, CowhandError):
        return error
    if isinstance(error, OverflowError):
        text = f"{doing} failed: no file is that long" if doing else "no file is that long"
        return IOFailed(text, qemu=os.strerror(_errno.EIO), path=path)
    number = error.errno or _errno.EIO
    kind = _BY_ERRNO.get(number, IOFailed)
    reason = os.strerror(number)
    text = f"{doing} failed: {reason}" if doing else reason
    return kind(text, qemu=reason, errno=number, path=path, hint=_cause(number, path))


def _cause(number: int, path: str | None) -> str | None:
    """Return what lies behind an errno which tells too little, where the system knows more."""
    if number not in (_errno.EFBIG, _errno.EROFS, _errno.EDQUOT, _errno.ENOSPC) or path is None:
        return None
    from cowhand.core import mounts

    try:
        return mounts.cause_of(number, path)
    except (OSError, ValueError):
        return None

"""Disks of the library's users that are not closed: closed when they are collected, or at the process's end, with a ResourceWarning.

What was written reaches the image then, and its locks go. The collector runs anywhere, also where a thread holds a lock that closing needs; so
another thread closes, and the collecting one waits for it a moment only.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import threading
import warnings
import weakref

from cowhand.block.disk import Disk

#: So long the collecting thread waits for the disk to be closed.
_PATIENCE_SECONDS = 2.0
#: What has to be closed at the end of the process.
_open: weakref.WeakSet[OwnedDisk] = weakref.WeakSet()
_registered = False
_collected = 0  #: counts disks that the collector found


class OwnedDisk(Disk):
    """A disk that a caller of the library has to close."""

    __slots__ = ()

    def __del__(self) -> None:
        if not self._is_open():
            return
        global _collected
        _collected += 1
        _warn(self)
        closer = threading.Thread(target=_close, args=(self,), name="closing a disk", daemon=True)
        try:
            closer.start()
        except RuntimeError:  # the interpreter is ending: what was registered for that has closed it
            return
        closer.join(_PATIENCE_SECONDS)

    def _is_open(self) -> bool:
        return not getattr(self, "_closed", True) and getattr(self, "_root", None) is not None


def own(disk: Disk) -> Disk:
    """Have *disk* closed for its user in the end, if the user does not."""
    global _registered
    if type(disk) is not Disk:
        return disk
    disk.__class__ = OwnedDisk
    assert isinstance(disk, OwnedDisk)
    _open.add(disk)
    if not _registered:
        _registered = True
        atexit.register(_close_all)
    return disk


def collect() -> bool:
    """Look for disks that are no longer referred to; return whether there were any, and so locks may be free now."""
    before = _collected
    gc.collect()
    return _collected > before


def idle_callbacks() -> int:
    """Return how many functions of this module are registered with atexit and have nothing to do."""
    return 1 if _registered and not any(disk._is_open() for disk in _open) else 0


def _warn(disk: Disk) -> None:
    access = "reading" if disk.read_only else "writing"
    # Where warnings are errors this one is told, too, and the disk is closed all the same.
    with contextlib.suppress(ResourceWarning):
        warnings.warn(
            f"'{disk.filename}' was opened for {access} and never closed", ResourceWarning, stacklevel=3, source=disk
        )


def _close(disk: Disk) -> None:
    try:
        disk.close()
    except Exception as error:  # noqa: BLE001 - nobody is left who could be told but by a warning
        warnings.warn(f"closing '{disk.filename}' failed: {error}", RuntimeWarning, stacklevel=2)


def _close_all() -> None:
    for disk in list(_open):
        if disk._is_open():
            _warn(disk)
            _close(disk)

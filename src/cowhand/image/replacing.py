"""May a file be replaced by another one of its name, or does only writing in place do?

Replacing is safe: the old file is there until the new one is complete. But a name is all that a rename gives: a device stays a device, other hard
links stay with the old content, and what another user owns is not given away by those who may not.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from cowhand.core.errors import CowhandError
from cowhand.core.mounts import is_mount_point


class CannotReplace(CowhandError):
    """The file can be written in place, but another one cannot take its place."""

    code = "cannot-replace"


def reason_for_place(path: str, *, names_relative: bool = False) -> str | None:
    """Return why the existing *path* has to be written in place, None where another file can take its place.

    *names_relative*: the new content names files relative to its own folder, so that a link into another folder counts.
    """
    real = os.path.realpath(path)
    try:
        found = os.stat(real)
    except OSError:
        return None  # a link to nothing, or one that cannot be looked at: making the file tells
    if not stat.S_ISREG(found.st_mode):
        return "it is a device" if stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode) else "it is no file"
    folder = os.path.dirname(real) or "."
    if found.st_nlink > 1:
        return f"the file has {found.st_nlink} names (hard links), and they are to stay one file"
    if is_mount_point(real):
        return "the file itself is a mount point"
    if names_relative and os.path.dirname(os.path.abspath(path)) != os.path.dirname(real):
        return "it is a link into another folder, and the image names others relative to the link's"
    return _owner(found) or _folder(folder)


def _owner(found: os.stat_result) -> str | None:
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return None  # whether that is allowed after all (in a container, say) is tried out: adopt
    if found.st_uid != os.geteuid():
        return "the file belongs to another user, who would lose it"
    if found.st_gid not in {os.getegid(), *os.getgroups()}:
        return "the file belongs to a group that this user is not in"
    return None


def _folder(folder: str) -> str | None:
    effective = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        return "no file can be made in its folder"
    return None


def adopt(old: int, new: int, path: str) -> None:
    """Give the file behind the descriptor *new* the mode, owner and extended attributes of *old*.

    Raises CannotReplace where the owner is not to be had; attributes and access lists that cannot be set are left out.
    """
    before = os.fstat(old)
    now = os.fstat(new)
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        try:
            os.fchown(new, before.st_uid, before.st_gid)
        except OSError as error:
            raise CannotReplace(
                f"a new file cannot be given the owner of '{path}' ({os.strerror(error.errno or 0)})", path=path
            ) from error
    if hasattr(os, "listxattr"):
        with suppress(OSError):
            for name in os.listxattr(old):
                with suppress(OSError):
                    os.setxattr(new, name, os.getxattr(old, name))
    # Last: with an access list the bits of the group are its mask.
    os.fchmod(new, stat.S_IMODE(before.st_mode))

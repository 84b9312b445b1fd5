"""File systems: which one a path lies on, and what is known of it.

Source: proc_pid_mountinfo(5). Where there is no ``/proc`` nothing is known.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from cowhand.core.units import format_size

_ESCAPE = re.compile(rb"\\([0-7]{3})")
#: Longest file of file systems whose limit users run into.
_LONGEST = {"vfat": (1 << 32) - 1, "msdos": (1 << 32) - 1, "minix": (1 << 32) - 1}


class Mount(NamedTuple):
    """A mounted file system: its type ("ext4"), where, and its options."""

    kind: str
    point: str
    options: frozenset[str]
    device: tuple[int, int]


def mounts() -> Iterator[Mount]:
    """Yield what is mounted, in the order of mounting. Nothing where the system does not tell."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            lines = file.readlines()
    except OSError:
        return
    for line in lines:
        fields = line.split()
        try:
            dash = fields.index(b"-")
            major, _, minor = fields[2].partition(b":")
            point = os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), fields[4]))
            options = frozenset(os.fsdecode(fields[5] + b"," + fields[dash + 3]).split(","))
            yield Mount(os.fsdecode(fields[dash + 1]), point, options, (int(major), int(minor)))
        except (ValueError, IndexError):
            continue


def mount_of(path: str) -> Mount | None:
    """Return the file system that holds *path*, or would hold it; None where that is not known."""
    real = os.path.realpath(path)
    best: Mount | None = None
    for mount in mounts():
        inside = real == mount.point or real.startswith(mount.point.rstrip("/") + "/")
        # Of two on one point the later one covers the other.
        if inside and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def is_mount_point(path: str) -> bool:
    """Tell whether something is mounted on *path* itself, a file or a folder."""
    real = os.path.realpath(path)
    return any(mount.point == real for mount in mounts())


def described(path: str) -> str:
    """Return words for the file system of *path*: "the file system (ext4, mounted on /srv)"."""
    mount = mount_of(path)
    return f"the file system ({mount.kind}, mounted on {mount.point})" if mount is not None else "the file system"


def may_compress(path: str) -> bool:
    """Tell whether the file system of *path* may store more than it has bytes: what is free says little then."""
    mount = mount_of(path)
    if mount is None:
        return False
    return mount.kind in ("zfs", "bcachefs") or any(option.startswith("compress") for option in mount.options)


def longest_file(path: str) -> int | None:
    """Return how many bytes a file on the file system of *path* may have, None where that is not known."""
    mount = mount_of(path)
    return _LONGEST.get(mount.kind) if mount is not None else None


def free_bytes(path: str) -> int | None:
    """Return what this user can still write to the file system of *path*, or of the folder that it would lie in; None where that is not known."""
    if not hasattr(os, "statvfs"):
        return None
    for name in (path, os.path.dirname(path) or "."):
        try:
            found = os.statvfs(name)
        except OSError:
            continue
        blocks = found.f_bfree if hasattr(os, "geteuid") and os.geteuid() == 0 else found.f_bavail
        return blocks * found.f_frsize if found.f_blocks else None
    return None


def cause_of(number: int, path: str) -> str | None:
    """Return a sentence on why the system answered with the errno *number* for the file *path*. Raises OSError."""
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            return "Nothing can be written behind the end of a device." if number == errno.ENOSPC else None
    except OSError:
        pass  # it is to be made
    place = described(path)
    place = place[0].upper() + place[1:]
    if number == errno.EROFS:
        return f"{place} is mounted read-only."
    if number == errno.EDQUOT:
        return "The quota of this user, or of the folder, is used up, whatever else is free."
    if number == errno.EFBIG:
        return _too_long(path, place)
    return _full(path, place)


def _too_long(path: str, place: str) -> str:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            return f"This process may write files of {format_size(limit)} at most (ulimit -f)."
    except (ImportError, OSError):
        pass
    longest = longest_file(path)
    most = f" ({format_size(longest)} at most)" if longest else ""
    return f"{place} holds no file of that length{most}. Use another file system, or a format that stores only what is used."


def _full(path: str, place: str) -> str | None:
    for name in (path, os.path.dirname(path) or "."):
        try:
            found = os.statvfs(name)
        except OSError:
            continue
        if found.f_files and not found.f_favail:
            return f"{place} has no inodes left for new files."
        break
    free = free_bytes(path)
    return f"{place} has {format_size(free)} free." if free is not None else None

"""File systems: which one a path lies on, and what is known of it.

Source: proc_pid_mountinfo(5). Where there is no ``/proc`` nothing is known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

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


def longest_file(path: str) -> int | None:
    """Return how many bytes a file on the file system of *path* may have, None where that is not known."""
    mount = mount_of(path)
    return _LONGEST.get(mount.kind) if mount is not None else None

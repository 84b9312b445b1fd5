"""Telling files and block devices apart whatever their names, and what a device lies on: a loop device's file, a partition's disk, LVM's devices."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple


class Identity(NamedTuple):
    """What tells a file from all others: kind "file" with device and inode, "device" with its numbers, "name" with the path of what is not there."""

    kind: str
    major: int = 0
    minor: int = 0
    name: str = ""


#: Devices over one another that are followed.
_MAX_DEPTH = 16


def identify(path: str | os.PathLike[str]) -> Identity | None:
    """Return what tells the file or block device from all others, whatever its name; None when it is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return identity_of(status)


def identity_of(status: os.stat_result) -> Identity:
    """Return the same for what was looked up already."""
    if stat.S_ISBLK(status.st_mode):
        return Identity("device", os.major(status.st_rdev), os.minor(status.st_rdev))
    return Identity("file", status.st_dev, status.st_ino)


def identify_name(path: str) -> Identity:
    """Return the identity of *path*; for what is not there, of its name with all links on the way followed."""
    found = identify(path)
    if found is not None:
        return found
    try:
        return Identity("name", name=os.path.realpath(path))
    except (OSError, ValueError):
        return Identity("name", name=path)


def lies_on(path: str | os.PathLike[str]) -> frozenset[Identity]:
    """Return the identities of *path* and of everything that its bytes are kept in, as far as the system tells; nothing when it is not there."""
    own = identify(path)
    if own is None:
        return frozenset()
    found = {own}
    queue = [(own, 0)]
    while queue:
        identity, depth = queue.pop()
        if identity.kind != "device" or depth >= _MAX_DEPTH:
            continue
        for below in _below(_sysfs(identity)):
            if below not in found:
                found.add(below)
                queue.append((below, depth + 1))
    return frozenset(found)


def files_under(device: str) -> list[str]:
    """Return the names of the files that the block *device* lies on, as far as the system tells: those of loop devices."""
    return [
        file
        for identity in lies_on(device)
        if identity.kind == "device" and (file := read_text(f"{_sysfs(identity)}/loop/backing_file"))
    ]


def _sysfs(device: Identity) -> str:
    return f"/sys/dev/block/{device.major}:{device.minor}"


def _below(sysfs: str) -> list[Identity]:
    """Return what the block device with the folder *sysfs* lies on directly."""
    found: list[Identity | None] = []
    file = read_text(f"{sysfs}/loop/backing_file")
    if file:
        found.append(identify(file))
    if os.path.exists(f"{sysfs}/partition"):
        found.append(_numbers(f"{os.path.realpath(sysfs)}/../dev"))
    try:
        slaves = os.listdir(f"{sysfs}/slaves")
    except OSError:
        slaves = []
    found += [_numbers(f"{sysfs}/slaves/{name}/dev") for name in slaves]
    return [identity for identity in found if identity is not None]


def _numbers(path: str) -> Identity | None:
    major, colon, minor = read_text(path).partition(":")
    return Identity("device", int(major), int(minor)) if colon and major.isdigit() and minor.isdigit() else None


def read_text(path: str) -> str:
    """Return what the small file *path* of the system says, without its last newline; nothing where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(4096).removesuffix("\n")
    except OSError:
        return ""

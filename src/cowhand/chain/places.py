"""Where images that read through others are looked for.

An image does not know its overlays. They lie beside it or below; beside the images that an operation names, or below; in folders beside those
(instances/A and instances/B over _base); in known pools; on block devices. Folders where unrelated things meet (``/``, ``/home``, ``/tmp``)
have no such neighbours, and neighbours end where a file system does.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from cowhand.chain.known_pools import known_pools
from cowhand.core.identity import files_under, identify, read_text

#: So many folders upwards of an image's own one are looked into for neighbours, each so many folders deep.
LEVELS_UP = 3
NEIGHBOUR_DEPTH = 3
#: Folders of a system in which things meet that have nothing to do with one another.
_MEETING = frozenset(
    ("/", "/home", "/usr", "/var", "/var/lib", "/etc", "/opt", "/run", "/run/media", "/mnt", "/media", "/dev", "/dev/shm", "/tmp", "/var/tmp")
)  # fmt: skip
#: Block devices that keep images as a whole: LVM and device mapper, loop, software RAID, nbd, rbd, ZFS volumes, DRBD, and disks.
_KINDS = ("dm-", "loop", "md", "nbd", "rbd", "zd", "drbd", "sd", "vd", "xvd", "nvme")
#: Those of them that a user is not expected to be able to read: nobody's images are missed if they cannot.
_DISKS = ("sd", "vd", "xvd", "nvme", "md")


class Place(NamedTuple):
    """A folder that is looked into, and folders below it down to *depth* (0: none, None: all)."""

    folder: str
    depth: int | None


class Device(NamedTuple):
    """A block device that is looked at; with *must* it counts as missed when it cannot be read."""

    path: str
    must: bool


def around(paths: Iterable[str], look_in: Iterable[str] = ()) -> list[Place]:
    """Return the folders in which images may lie that read through one of *paths*, with the folders *look_in*. Own ones come first.

    For a device they are those of the file that it lies on (a loop device), and the working directory.
    """
    own: dict[str, None] = {}
    for path in paths:
        if _is_device(path):
            own |= dict.fromkeys((*map(folder_of, files_under(path)), os.curdir))
        else:
            own |= dict.fromkeys((folder_of(path), os.path.dirname(path) or os.curdir))
    places = [Place(folder, _depth_below(folder)) for folder in own]
    places += [Place(folder, None) for folder in (*look_in, *known_pools().folders)]
    for folder in own:
        places += [Place(above, NEIGHBOUR_DEPTH) for above in _above(folder)]
    return list(dict.fromkeys(places))


def _is_device(path: str) -> bool:
    found = identify(path)
    return found is not None and found.kind == "device"


def _depth_below(folder: str) -> int | None:
    """Return how many folders deep is looked below an image's own *folder*: without end, but where things meet."""
    try:
        if os.path.realpath(folder) == "/":
            return 1
        return NEIGHBOUR_DEPTH if _meets(folder) else None
    except OSError:
        return None


def folder_of(path: str | os.PathLike[str]) -> str:
    """Return the folder that the file *path* lies in, links of the file itself followed; written as *path* is."""
    name = os.path.realpath(path) if os.path.islink(path) else os.fspath(path)
    return os.path.dirname(name) or os.curdir


def _above(folder: str) -> list[str]:
    """Return the folders over *folder* in which its neighbours lie, the nearest first, written as *folder* is."""
    found: list[str] = []
    try:
        device = os.stat(folder).st_dev
        if _meets(folder):
            return []
        for _ in range(LEVELS_UP):
            folder = os.path.normpath(os.path.join(os.path.realpath(folder), os.pardir))
            if os.stat(folder).st_dev != device or _meets(folder):
                break
            found.append(folder)
    except OSError:
        return found  # a folder over it that cannot even be looked up: it has no neighbours for this user
    return [_as_written(name) for name in found]


def _meets(folder: str) -> bool:
    """Tell whether things meet in *folder* that have nothing to do with one another: by its name, or as everyone may write there (sticky)."""
    return os.path.realpath(folder) in _MEETING or bool(os.stat(folder).st_mode & stat.S_ISVTX)


def _as_written(folder: str) -> str:
    """Return *folder* relative to the working directory where that is shorter to read: below it, or just above."""
    relative = os.path.relpath(folder)
    return relative if relative == os.curdir or not relative.startswith(os.pardir) else folder


def block_devices() -> list[Device]:
    """Return the block devices that may hold an image: there, not empty, neither mounted nor swapped on nor part of another one."""
    try:
        names = sorted(os.listdir("/sys/class/block"))
    except OSError:
        return []
    used = _used()
    found = []
    for name in names:
        if not name.startswith(_KINDS):
            continue
        folder = f"/sys/class/block/{name}"
        if read_text(f"{folder}/size") in ("", "0") or read_text(f"{folder}/dev") in used or _held(folder):
            continue
        mapped = read_text(f"{folder}/dm/name")
        path = f"/dev/mapper/{mapped}" if mapped else f"/dev/{name.replace('!', '/')}"
        if not os.path.exists(path):
            path = f"/dev/{name.replace('!', '/')}"
        try:
            if stat.S_ISBLK(os.stat(path).st_mode):
                found.append(Device(path, not name.startswith(_DISKS)))
        except OSError:
            continue  # the system knows it, and this process cannot name it: a container
    return found


def _held(folder: str) -> bool:
    try:
        return bool(os.listdir(f"{folder}/holders"))
    except OSError:
        return False


def _used() -> set[str]:
    """Return "MAJOR:MINOR" of what is mounted or swapped on."""
    found = set()
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            found = {line.split(" ", 3)[2] for line in file}
        with open("/proc/swaps", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                try:
                    number = os.stat(line.split()[0]).st_rdev
                except (OSError, IndexError):
                    continue
                found.add(f"{os.major(number)}:{os.minor(number)}")
    except OSError:
        pass
    return found

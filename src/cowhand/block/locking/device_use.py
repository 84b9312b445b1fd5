"""Refusing to write what the system itself uses: mounted file systems, swap, devices under LVM, RAID or loop devices, and the files of these.

Such uses take no image locks. :func:`refused` and :func:`allowed` decide for all that is opened for writing while they last, in the thread (or
context) that entered them; outside of them nothing is asked, as in QEMU.

Sources: proc(5) for mountinfo and swaps; the kernel's ABI documentation for ``/sys/dev/block`` (holders, partitions, loop).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from cowhand.core.errors import ImageInUse
from cowhand.core.identity import Identity, identify, read_text

_refusing: ContextVar[bool | None] = ContextVar("refuse_used_devices", default=None)
#: Devices over one another that are followed.
_MAX_DEPTH = 16
#: So many uses are named in a message.
_SHOWN = 3


@contextmanager
def refused(refuse: bool = True, *, default: bool = False) -> Iterator[None]:
    """Refuse to open for writing what the system uses, in this block; with *default* only where no block around has decided."""
    if default and _refusing.get() is not None:
        yield
        return
    token = _refusing.set(refuse)
    try:
        yield
    finally:
        _refusing.reset(token)


def allowed() -> AbstractContextManager[None]:
    """Return a context manager in which such files and devices are written all the same: what is mounted may be destroyed."""
    return refused(False)


def check(path: str) -> None:
    """Raise ImageInUse when *path* is about to be written, the system uses it, and that is refused here."""
    if not _refusing.get():
        return
    found = uses(path)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ImageInUse(
            f"'{path}' is in use: {'; '.join(found[:_SHOWN])}{more}",
            path=path,
            hint="Writing to it would destroy what is there. End that use first (umount, swapoff, losetup -d, vgchange -an), or insist with "
            "--force.",
        )


def uses(path: str) -> list[str]:
    """Return what the system uses the file or block device *path* for, in words; nothing where it does not."""
    own = identify(path)
    if own is None or not os.path.isdir("/sys/dev/block"):
        return []
    search = _Search()
    search.follow(own, "", 0)
    if own.kind == "device":
        disk = _numbers(f"{os.path.realpath(_sysfs(own))}/../dev") if _is_partition(own) else None
        if disk is not None:  # a disk that is used as a whole, whose bytes look like partitions
            search.direct(disk, f"the whole disk, {_name(disk)}, ")
            for holder in _children(disk, "holders"):
                search.found.append(f"the whole disk, {_name(disk)}, is part of {_name(holder)}")
        if not search.found and _held(path):
            search.found.append("the system holds it exclusively (it may be mounted elsewhere)")
    return list(dict.fromkeys(search.found))


class _Search:
    """What one question finds out; mounts, swaps and loop devices are read once."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._seen: set[Identity] = set()
        self._mounts = _mounts()
        self._swaps = _swaps()
        self._loops = _loops()

    def follow(self, at: Identity, what: str, depth: int) -> None:
        """Look at *at*, which is called *what* ("" for what was asked about), and at everything that lies on it."""
        if at in self._seen or depth > _MAX_DEPTH:
            return
        self._seen.add(at)
        self.direct(at, what)
        for loop in self._loops.get(at, ()):
            self.found.append(f"{what or 'it '}is what {_name(loop)} shows")
            self.follow(loop, f"{_name(loop)} ", depth + 1)
        if at.kind != "device":
            return
        for holder in _children(at, "holders"):
            self.found.append(f"{what or 'it '}is part of {_name(holder)}")
            self.follow(holder, f"{_name(holder)} ", depth + 1)
        for partition in _partitions(at):
            self.follow(partition, f"its partition {_name(partition)} ", depth + 1)

    def direct(self, at: Identity, what: str) -> None:
        """Look at the uses of *at* itself."""
        if at.kind == "device":
            self.found += [f"{what or 'it '}is mounted on {where}" for where in self._mounts.get(at, ())[:1]]
        if at in self._swaps:
            self.found.append(f"{what or 'it '}is swap space")


def _sysfs(device: Identity) -> str:
    return f"/sys/dev/block/{device.major}:{device.minor}"


def _name(device: Identity) -> str:
    """Return the name that people know *device* by."""
    folder = _sysfs(device)
    mapped = read_text(f"{folder}/dm/name")
    if mapped:
        return f"/dev/mapper/{mapped}"
    return f"/dev/{os.path.basename(os.path.realpath(folder))}"


def _is_partition(device: Identity) -> bool:
    return os.path.exists(f"{_sysfs(device)}/partition")


def _numbers(path: str) -> Identity | None:
    major, _, minor = read_text(path).partition(":")
    return Identity("device", int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _children(device: Identity, kind: str) -> list[Identity]:
    folder = f"{_sysfs(device)}/{kind}"
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [found for name in names if (found := _numbers(f"{folder}/{name}/dev")) is not None]


def _partitions(device: Identity) -> list[Identity]:
    folder = os.path.realpath(_sysfs(device))
    try:
        names = sorted(name for name in os.listdir(folder) if os.path.exists(f"{folder}/{name}/partition"))
    except OSError:
        return []
    return [found for name in names if (found := _numbers(f"{folder}/{name}/dev")) is not None]


def _mounts() -> dict[Identity, list[str]]:
    """Return where block devices are mounted. The device number is that of the file system, which for btrfs is none of a device: its source is."""
    found: dict[Identity, list[str]] = {}
    for line in _lines("/proc/self/mountinfo"):
        fields = line.split(" ")
        if len(fields) < 10 or "-" not in fields[6:]:
            continue
        source = fields[fields.index("-", 6) + 2]
        major, _, minor = fields[2].partition(":")
        devices = {Identity("device", int(major), int(minor))} if major.isdigit() and minor.isdigit() else set()
        if source.startswith("/"):
            named = identify(_unescaped(source))
            if named is not None and named.kind == "device":
                devices.add(named)
        for device in devices:
            found.setdefault(device, []).append(_unescaped(fields[4]))
    return found


def _swaps() -> set[Identity]:
    found = (identify(_unescaped(line.split()[0])) for line in _lines("/proc/swaps")[1:] if line.split())
    return {one for one in found if one is not None}


def _loops() -> dict[Identity, list[Identity]]:
    """Return the loop devices by what they show."""
    found: dict[Identity, list[Identity]] = {}
    try:
        names = sorted(name for name in os.listdir("/sys/block") if name.startswith("loop"))
    except OSError:
        return found
    for name in names:
        file = read_text(f"/sys/block/{name}/loop/backing_file")
        below = identify(file) if file else None
        loop = _numbers(f"/sys/block/{name}/dev")
        if below is not None and loop is not None:
            found.setdefault(below, []).append(loop)
    return found


def _held(path: str) -> bool:
    """Ask the kernel: opening a block device exclusively fails where a file system or another device claims it, in any name space."""
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            return False
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        import errno

        return error.errno == errno.EBUSY
    return False


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(1 << 22).splitlines()
    except OSError:
        return []


def _unescaped(text: str) -> str:
    """Return *text* with the system's octal escapes (a space is \\040) undone."""
    import re

    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)

"""Who holds image locks on a file, as the system tells it (Linux: /proc/PID/fd and fdinfo; other systems tell nothing).

/proc/locks says -1 for the owners of open-file-description locks; the lines of /proc/PID/fdinfo/N are those of one descriptor. Another user's
processes may not be looked at: the kernel is asked whether locks are left that nobody seen holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from cowhand.block.locking.image_lock import PERMISSION_BYTE, REFUSAL_BYTE
from cowhand.block.node.node import PERMISSION_NAMES
from cowhand.core.errors import from_os_error

#: Descriptors looked at; a busy machine has some ten thousand.
SCAN_LIMIT = 200_000
_LAST = (1 << 63) - 1
_ACCESS = ("read", "write", "read and write", "read and write")


class FileLock(NamedTuple):
    """Bytes ``first`` to ``last`` of the file, locked for "read" (shared) or "write" (exclusive)."""

    first: int
    last: int
    mode: str


class LockHolder(NamedTuple):
    """A process that has the file open. ``pid`` 0: one that may not be looked at, or the kernel itself.

    ``uses`` are the permissions that it uses, ``refuses`` those that it does not let others have, in QEMU's names; both empty: it holds no
    image locks. ``locks`` are all its locks as they lie on the file; ``access`` is how it opened the file.
    """

    pid: int
    program: str
    command: tuple[str, ...] = ()
    user: str = ""
    access: str = ""
    uses: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    locks: tuple[FileLock, ...] = ()


def lock_holders(path: str | os.PathLike[str]) -> list[LockHolder]:
    """Return who has the file *path* open, but for this process, by number; those that may not be looked at come last.

    Raises ImageNotFound, AccessDenied.
    """
    name = os.fspath(path)
    try:
        stat = os.stat(name)
    except OSError as error:
        raise from_os_error(error, name, doing="looking for locks") from error
    key = (stat.st_dev, stat.st_ino)
    found: dict[int, tuple[set[FileLock], int]] = {}
    for pid, descriptor in descriptors_of(key):
        locks, access = _fdinfo(pid, descriptor)
        known, before = found.get(pid, (set(), 0))
        found[pid] = (known | set(locks), before | (3 if access == 2 else access))
    holders = [_holder(pid, locks, access) for pid, (locks, access) in sorted(found.items())]
    holders += [LockHolder(0, f"{device} (loop device)", access="read and write") for device in _loops(key)]
    try:
        rest = _unseen(name, {lock for locks, _ in found.values() for lock in locks})
    except OSError as error:
        if not holders and isinstance(error, PermissionError):
            # Somebody else's process may have it open: to say "nobody" would be a guess.
            raise from_os_error(error, name, doing="looking for locks") from error
        rest = set()
    if rest:
        holders.append(_described(0, "another user's process", (), "", "", rest))
    return holders


def descriptors_of(key: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (process, descriptor) of whatever has the file *key* (device, inode) open, but for this process."""
    own = os.getpid()
    looked = 0
    try:
        names = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    except OSError:
        return
    for pid in names:
        if pid == own:
            continue
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # ended, or another user's
        for descriptor in descriptors:
            looked += 1
            if looked > SCAN_LIMIT:
                return
            try:
                stat = os.stat(f"/proc/{pid}/fd/{descriptor}")
            except OSError:
                continue
            if (stat.st_dev, stat.st_ino) == key:
                yield pid, int(descriptor)


def holds_byte(pid: int, descriptor: int, byte: int) -> bool:
    """Tell whether that descriptor has a lock on *byte*."""
    return any(lock.first <= byte <= lock.last for lock in _fdinfo(pid, descriptor)[0])


def _fdinfo(pid: int, descriptor: int) -> tuple[list[FileLock], int]:
    """Return the locks of a descriptor, and its access mode (0 read, 1 write, 2 both)."""
    # lock:	1: OFDLCK ADVISORY  READ -1 fd:00:1234 100 101
    locks, access = [], 0
    try:
        with open(f"/proc/{pid}/fdinfo/{descriptor}", encoding="ascii", errors="replace") as lines:
            for line in lines:
                words = line.split()
                if words[:1] == ["flags:"] and len(words) == 2:
                    access = int(words[1], 8) & 3
                elif words[:1] == ["lock:"] and len(words) >= 9 and words[7].isdigit():
                    last = _LAST if words[8] == "EOF" else int(words[8])
                    locks.append(FileLock(int(words[7]), last, words[4].lower()))
    except (OSError, ValueError):
        pass  # ended meanwhile
    return locks, access


def _holder(pid: int, locks: set[FileLock], access: int) -> LockHolder:
    command = tuple(part.decode("utf-8", "surrogateescape") for part in _read(pid, "cmdline").split(b"\0")[:-1])
    program = _read(pid, "comm").decode("utf-8", "surrogateescape").strip() or "a program"
    return _described(pid, program, command, _user(pid), _ACCESS[access], locks)


def _described(
    pid: int, program: str, command: tuple[str, ...], user: str, access: str, locks: set[FileLock]
) -> LockHolder:
    def named(base: int) -> tuple[str, ...]:
        return tuple(
            name
            for bit, name in PERMISSION_NAMES.items()
            if any(lock.first <= base + bit.bit_length() - 1 <= lock.last for lock in locks)
        )

    return LockHolder(
        pid, program, command, user, access, named(PERMISSION_BYTE), named(REFUSAL_BYTE), tuple(sorted(locks))
    )


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read(1 << 16)
    except OSError:
        return b""


def _user(pid: int) -> str:
    try:
        number = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return ""
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _loops(key: tuple[int, int]) -> Iterator[str]:
    """Yield the loop devices that the file backs: the kernel holds it open, and no process does."""
    try:
        names = sorted(name for name in os.listdir("/sys/block") if name.startswith("loop"))
    except OSError:
        return
    for name in names:
        try:
            with open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8", errors="surrogateescape") as file:
                stat = os.stat(file.read().rstrip("\n"))
        except OSError:
            continue
        if (stat.st_dev, stat.st_ino) == key:
            yield f"/dev/{name}"


def _unseen(path: str, seen: set[FileLock]) -> set[FileLock]:
    """Return locks on QEMU's bytes that none of the processes seen holds."""
    from cowhand.block.locking.image_lock import locked_bytes

    wanted = [base + bit.bit_length() - 1 for base in (PERMISSION_BYTE, REFUSAL_BYTE) for bit in PERMISSION_NAMES]
    found = locked_bytes(path, wanted)
    return {
        FileLock(byte, byte, mode)
        for byte, mode in found.items()
        if not any(lock.first <= byte <= lock.last for lock in seen)
    }

"""Image locks: what processes that use one image file permit each other, in the bytes that QEMU uses for it.

Source: QEMU's ``docs/system/qemu-block-drivers`` ("Disk image file locking") and the byte numbers in COMPAT's facts: a process that uses permission
*bit* holds a shared open-file-description lock on byte 100 + bit; one that does not let others have it holds byte 200 + bit. Before relying on
either it looks whether somebody holds the opposite. All locks are shared ones, so holders never wait and never block a reader of the bytes.

Open-file-description locks belong to a descriptor, not to a process: so there is one lock descriptor for each inode and process, opened for
nothing else, and the data descriptors may be closed and opened again without losing a lock. A forked child shares (and keeps) them.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cowhand.block.node.node import ALL_PERMISSIONS, PERMISSION_NAMES
from cowhand.core.errors import CowhandError, ImageInUse, NotSupported, from_os_error
from cowhand.core.locks import RANK_REGISTRY, ranked_lock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PERMISSION_BYTE = 100  #: QEMU's: "I use this permission"
REFUSAL_BYTE = 200  #: QEMU's: "nobody else may use it"

#: struct flock with a 64-bit off_t: type, whence, start, length, pid (0 for open-file-description locks), padded to its alignment.
_FLOCK = struct.Struct("hhqqi0q")
_NO_LOCKS_HERE = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})

#: How many blocks of :func:`missing_locks_allowed` are being run.
_allowed = 0
_registry: dict[tuple[int, int], _LockFile] = {}
_lock = ranked_lock(RANK_REGISTRY, "image locks")


class NoLocks(NotSupported):
    """The file system of an image that is to be written has no locks, so that nobody else could be kept from it."""

    code = "no-locks"


@contextmanager
def missing_locks_allowed() -> Iterator[None]:
    """Let images be written, while the block runs, on file systems that have no locks: the caller knows that nothing else uses them.

    Where there are locks they are taken as ever. Holds for every thread of the process.
    """
    global _allowed
    with _lock:
        _allowed += 1
    try:
        yield
    finally:
        with _lock:
            _allowed -= 1


def are_missing_locks_allowed() -> bool:
    """Tell whether a block of :func:`missing_locks_allowed` is being run."""
    return _allowed > 0


class Holder:
    """One user of an image file in this process. Make it with :func:`hold`; not shared between files. Thread-safe."""

    def __init__(self, file: _LockFile, path: str, who: str) -> None:
        self.path = path
        self.who = who  #: names the user in the error of another one in this process
        self.perm = 0
        self.shared = ALL_PERMISSIONS
        self._file: _LockFile | None = file

    def update(self, perm: int, shared: int) -> None:
        """Use the permissions *perm* and let others use *shared* from now on; on an error everything is as before.

        Raises ImageInUse when another process, or another holder of this one, excludes it.
        """
        with _lock:
            if self._file is None or (perm, shared) == (self.perm, self.shared):
                return
            self._file.change(self, perm, shared)
            self.perm, self.shared = perm, shared

    def release(self) -> None:
        """Give back every lock of this holder. May be called again."""
        with _lock:
            file, self._file = self._file, None
            if file is not None:
                file.remove(self)


def hold(descriptor: int, path: str, who: str) -> Holder:
    """Return a new holder, without locks yet, of the file behind the open *descriptor*, which the user named *path*.

    Raises NotSupported where the system has no open-file-description locks, AccessDenied where the file cannot be opened a second time.
    """
    if not _available():
        raise NotSupported("this system has no open-file-description locks", path=path)
    stat = os.fstat(descriptor)
    key = (stat.st_dev, stat.st_ino)
    with _lock:
        file = _registry.get(key)
        if file is None:
            file = _registry[key] = _LockFile(key, _open_again(descriptor, path, key))
        holder = Holder(file, path, who)
        file.holders.append(holder)
        return holder


def _available() -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    return hasattr(fcntl, "F_OFD_SETLK")


def _open_again(descriptor: int, path: str, key: tuple[int, int]) -> int:
    """Open the inode behind *descriptor* once more: a duplicate would share its open file description and so its locks."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    failure: OSError | None = None
    for name in (f"/proc/self/fd/{descriptor}", path):
        try:
            fd = os.open(name, flags)
        except OSError as error:
            failure = error
            continue
        stat = os.fstat(fd)
        if (stat.st_dev, stat.st_ino) == key:
            return fd
        os.close(fd)
    if failure is not None:
        raise from_os_error(failure, path, doing="opening for locks")
    raise NotSupported("the file was replaced while it was being opened", path=path)


class _LockFile:
    """The lock descriptor of one inode and those in this process who hold locks through it. Used under the module's lock."""

    def __init__(self, key: tuple[int, int], fd: int) -> None:
        self.key = key
        self.fd = fd
        self.holders: list[Holder] = []
        self.held: set[int] = set()  #: byte numbers

    def change(self, holder: Holder, perm: int, shared: int) -> None:
        """Lock what *holder* newly needs, look for conflicts, and unlock what nobody here needs any more."""
        others = [other for other in self.holders if other is not holder]
        for other in others:
            if perm & ~other.shared:
                raise _in_use(holder.path, perm & ~other.shared, refused=True, user=f"this process, as {other.who},")
            if other.perm & ~shared:
                raise _in_use(holder.path, other.perm & ~shared, refused=False, user=f"this process, as {other.who},")
        wanted = _bytes_of(perm, shared)
        for other in others:
            wanted |= _bytes_of(other.perm, other.shared)
        added: list[int] = []
        try:
            for byte in sorted(wanted - self.held):
                self._set(byte, holder.path)
                added.append(byte)
            self._look(holder.path, perm, shared)
        except BaseException:
            self._unlock(added)
            raise
        self.held.update(added)
        self._unlock(self.held - wanted)

    def remove(self, holder: Holder) -> None:
        """Forget *holder*; the last one closes the descriptor, and with it every lock goes."""
        self.holders.remove(holder)
        if not self.holders:
            del _registry[self.key]
            os.close(self.fd)
            return
        wanted: set[int] = set()
        for other in self.holders:
            wanted |= _bytes_of(other.perm, other.shared)
        self._unlock(self.held - wanted)

    def _set(self, byte: int, path: str) -> None:
        import fcntl

        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # an exclusive lock, not one of QEMU's or ours
                raise ImageInUse(
                    f"image '{path}' is locked as a whole by {_named(self, byte) or 'another process'}",
                    qemu=f"Failed to lock byte {byte}",
                    hint="End that program, or open the image with locking=off if you know that it does not write.",
                    path=path,
                ) from error
            raise _locking_failed(error, byte, path) from error

    def _unlock(self, wanted: set[int] | list[int]) -> None:
        import fcntl

        for byte in list(wanted):
            # Giving back can only fail where the locks were lost with a server: closing the descriptor ends what is left of them.
            with suppress(OSError):
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))
            self.held.discard(byte)

    def _look(self, path: str, perm: int, shared: int) -> None:
        for bit in _bits(perm):
            self._refuse_if_held(path, bit, REFUSAL_BYTE, refused=True)
        for bit in _bits(ALL_PERMISSIONS & ~shared):
            self._refuse_if_held(path, bit, PERMISSION_BYTE, refused=False)

    def _refuse_if_held(self, path: str, bit: int, base: int, *, refused: bool) -> None:
        import fcntl

        # Asking for an exclusive lock finds everybody's locks but our own; asking takes nothing.
        byte = base + bit.bit_length() - 1
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        try:
            answer = _FLOCK.unpack(fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, question))
        except OSError as error:
            raise _locking_failed(error, byte, path) from error
        if answer[0] != fcntl.F_UNLCK:
            raise _in_use(path, bit, refused=refused, user=_named(self, byte, answer[4]) or "another process")


def _bits(mask: int) -> Iterator[int]:
    for bit in PERMISSION_NAMES:
        if mask & bit:
            yield bit


def _bytes_of(perm: int, shared: int) -> set[int]:
    """Return the bytes that somebody locks who uses *perm* and lets others have *shared*."""
    used = {PERMISSION_BYTE + bit.bit_length() - 1 for bit in _bits(perm)}
    return used | {REFUSAL_BYTE + bit.bit_length() - 1 for bit in _bits(ALL_PERMISSIONS & ~shared)}


def _locking_failed(error: OSError, byte: int, path: str) -> CowhandError:
    """Return what a lock call that failed stands for: a file system without locks, or what the system says."""
    if error.errno not in _NO_LOCKS_HERE:
        return from_os_error(error, path, doing="locking")
    reason = os.strerror(error.errno or 0)
    return NoLocks(
        f"the file system of '{path}' has no locks ({reason}), so others cannot be kept from writing the image",
        qemu=f"Failed to lock byte {byte}: {reason}",
        hint="If nothing else uses the image, go on without locks: --no-locks (as an option of the image: file.locking=off).",
        path=path,
    )


def _in_use(path: str, mask: int, *, refused: bool, user: str) -> ImageInUse:
    bit = next(_bits(mask))
    name = PERMISSION_NAMES[bit]
    if refused:
        does = {"write": "does not let others write to it", "resize": "does not let others resize it"}.get(
            name, "does not let others use it"
        )
    else:
        does = {"write": "has it open for writing", "resize": "may resize it"}.get(name, "has it open")
    kind = "" if refused else "shared "
    question = f"Is another process using the image [{path}]?"
    hint = "End that use first."
    if not refused:
        hint += " To read the image all the same, while it may be changing, open it without locks (-U, --force-share, force-share=on)."
    return ImageInUse(
        f"image '{path}' is in use: {user} {does}",
        qemu=f'Failed to get {kind}"{name}" lock\n{question}',
        hint=hint,
        path=path,
        permission=name,
    )


def _named(file: _LockFile, byte: int, pid: int = -1) -> str | None:
    """Return "qemu-io (process 4711)" for those other processes that hold *byte*, where the system tells; None where it does not."""
    found = [pid] if pid > 0 else list(_holders(file.key, byte))
    return " and ".join(f"{_command(number)} (process {number})" for number in found[:3]) or None


def _holders(key: tuple[int, int], byte: int) -> Iterator[int]:
    """Yield the processes with a lock on *byte*."""
    from cowhand.block.locking.holders import descriptors_of, holds_byte

    last = None
    for pid, descriptor in descriptors_of(key):
        if pid != last and holds_byte(pid, descriptor, byte):
            last = pid
            yield pid


def locked_bytes(path: str, wanted: Iterable[int]) -> dict[int, str]:
    """Return {byte: "read" or "write"} of those *wanted* that any other descriptor has locked in the file *path*. Raises OSError."""
    if not _available():
        return {}
    import fcntl

    found: dict[int, str] = {}
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for byte in wanted:
            question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            try:
                answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
            except OSError as error:
                if error.errno in _NO_LOCKS_HERE:
                    break  # nobody has locks there
                raise
            if answer[0] != fcntl.F_UNLCK:
                found[byte] = "write" if answer[0] == fcntl.F_WRLCK else "read"
    finally:
        os.close(fd)
    return found


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip() or "a program"
    except OSError:
        return "a program"

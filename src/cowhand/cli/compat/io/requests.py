"""``read``, ``readv``, ``write``, ``writev`` and ``discard``, done at once."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cowhand.cli.compat import program
from cowhand.cli.compat.img.records import whole_sectors
from cowhand.cli.compat.io import parsing
from cowhand.cli.compat.io.parsing import MAX_REQUEST, Complaint, UsageComplaint, number
from cowhand.cli.compat.io.report import Timer, dump, failed, statistics, verify
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError, InvalidFormat, IOFailed, NoSpace, NotSupported

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.cli.compat.io.session import Session

MAX_FILLED = 64 << 20
#: What a write writes when nothing else is said.
DEFAULT_PATTERN = 0xCD


def the_disk(session: Session) -> Disk:
    """Return the open disk: the table says which commands need one."""
    assert session.disk is not None
    return session.disk


def timed(session: Session, what: str, work: Callable[[], object]) -> Timer:
    """Do *work*, show what has ended in the background meanwhile, and return the time that it took. Raises Complaint."""
    timer = Timer()
    try:
        work()
    except CowhandError as error:
        session.background.show()
        raise failed(what, error) from error
    timer.stop()
    session.background.show()
    return timer


def read(session: Session, words: Sequence[str]) -> bool:
    """Read a range; ``-v`` shows it, ``-P`` compares it with a byte, ``-b`` reads the VM state."""
    positional: list[str] = []
    flags: set[str] = set()
    byte = length = None
    begin = 0
    for key, value in parsing.options(words, "bCl:pP:qs:v", positional, registered=True):
        if key == "P":
            byte = parsing.pattern(value)
        elif key == "l":
            length = number(value)
        elif key == "s":
            begin = number(value)
        flags.add(key)
    if len(positional) != 2:
        raise UsageComplaint
    offset, count = number(positional[0]), _limited(positional[1], "")
    if byte is None and flags & {"s", "l"}:
        raise UsageComplaint
    if length is None:
        length = count - begin
    if length < 0 or length + begin > count:
        raise Complaint("pattern verification range exceeds end of read data")
    disk = the_disk(session)
    if "b" in flags:
        parsing.aligned(offset, "offset")
        parsing.aligned(count, "count")
    buffer = unread(count)
    timer = timed(session, "read", lambda: _read_into(disk, offset, buffer, vmstate="b" in flags))
    good = True
    if byte is not None:
        good = verify(memoryview(buffer)[begin : begin + length], byte, offset + begin)
    if "q" not in flags:
        if "v" in flags:
            dump(buffer, offset)
        statistics("read", timer, offset, count, count, terse="C" in flags)
    return good


def _limited(text: str, without: str) -> int:
    count = number(text)
    if count > MAX_REQUEST:
        raise Complaint(f"length cannot exceed {MAX_REQUEST}{without}, given {text}")
    return count


def unread(count: int) -> bytearray:
    """Return a buffer to read into, filled with QEMU's byte: a disk without content (null-co) leaves it there."""
    # Not for very long requests, whose memory would all be touched twice.
    return bytearray(b"\xab") * count if count <= MAX_FILLED else bytearray(count)


def room(disk: Disk, offset: int, count: int) -> int:
    """Return how many of *count* bytes at *offset* can be written. A last, incomplete sector is made whole first.

    Raises NoSpace where the disk cannot be resized: what lies behind its last byte is not there.
    """
    end = offset + count
    if not offset <= disk.size < end <= whole_sectors(disk.size):
        return count
    if not disk.root.capabilities.resizable:
        raise NoSpace("the disk ends inside this request", qemu="No space left on device", offset=offset)
    disk.resize(whole_sectors(disk.size))
    return min(count, disk.size - offset)


def read_disk(disk: Disk, offset: int, buffer: bytearray) -> None:
    """Fill *buffer*; the disk ends with a whole sector, whose rest is zeroes."""
    rest = max(0, offset + len(buffer) - disk.size)
    if not rest or offset > disk.size or offset + len(buffer) > whole_sectors(disk.size):
        disk.read_into(offset, buffer)
        return
    with memoryview(buffer) as view:
        view[len(buffer) - rest :] = bytes(rest)
        disk.read_into(offset, view[: len(buffer) - rest])


def _read_into(disk: Disk, offset: int, buffer: bytearray, *, vmstate: bool) -> None:
    if not vmstate:
        read_disk(disk, offset, buffer)
        return
    node: Any = disk.root
    if not hasattr(node, "read_vmstate"):
        raise NotSupported("this format holds no VM state")
    try:
        buffer[:] = disk.read_vmstate(offset, len(buffer))
    except InvalidFormat:
        buffer[:] = bytes(len(buffer))  # as QEMU: what no table reaches reads as zeroes


def readv(session: Session, words: Sequence[str]) -> bool:
    """Read a range into several buffers, which here are one."""
    positional: list[str] = []
    flags: set[str] = set()
    byte = None
    for key, value in parsing.options(words, "CP:qv", positional, registered=True):
        if key == "P":
            byte = parsing.pattern(value)
        flags.add(key)
    if len(positional) < 2:
        raise UsageComplaint
    offset = number(positional[0])
    buffer = unread(sum(parsing.lengths(positional[1:])))
    disk = the_disk(session)
    timer = timed(session, "readv", lambda: read_disk(disk, offset, buffer))
    good = verify(buffer, byte, offset) if byte is not None else True
    if "q" not in flags:
        if "v" in flags:
            dump(buffer, offset)
        statistics("read", timer, offset, len(buffer), len(buffer), terse="C" in flags)
    return good


def write(session: Session, words: Sequence[str]) -> bool:
    """Write a byte over a range, or the content of a file again and again (``-s``), or zeroes (``-z``), or compressed (``-c``)."""
    positional: list[str] = []
    flags: set[str] = set()
    byte, source = DEFAULT_PATTERN, None
    for key, value in parsing.options(words, "bcCfnpP:qs:uz", positional, registered=True):
        if key == "P":
            byte = parsing.pattern(value)
        elif key == "s":
            source = value
        flags.add(key)
    if len(positional) != 2:
        raise UsageComplaint
    _check_write_flags(flags)
    offset = number(positional[0])
    count = number(positional[1]) if "n" in flags else _limited(positional[1], " without -n")
    if flags & {"b", "c"}:
        parsing.aligned(offset, "offset")
        parsing.aligned(count, "count")
    disk = the_disk(session)
    fua = "f" in flags
    work: Callable[[], object]
    if "z" in flags:

        def work() -> None:
            disk.write_zeroes(offset, room(disk, offset, count), unmap="u" in flags, fallback="n" not in flags, fua=fua)

    else:
        data = bytes([byte]) * count if source is None else _repeated(source, count)

        def work() -> None:
            _write_data(disk, offset, data, flags, fua=fua)

    timer = timed(session, "write", work)
    if "q" not in flags:
        statistics("wrote", timer, offset, count, count, terse="C" in flags)
    return True


def _check_write_flags(flags: set[str]) -> None:
    for wrong, message in (
        ({"b", "z"} <= flags, "-b and -z cannot be specified at the same time"),
        ("f" in flags and flags & {"b", "c"}, "-f and -b or -c cannot be specified at the same time"),
        ("n" in flags and "z" not in flags, "-n requires -z to be specified"),
        ("u" in flags and "z" not in flags, "-u requires -z to be specified"),
        (len(flags & {"z", "P", "s"}) > 1, "Only one of -z, -P, and -s can be specified at the same time"),
    ):
        if wrong:
            raise Complaint(message)


def _repeated(path: str, count: int) -> bytes:
    """Return *count* bytes of the file's content, over and over."""
    try:
        with open(path, "rb") as file:
            content = file.read(count or 1)
    except OSError as error:
        program.plain(f"{path}: {error.strerror}")
        raise Failure from None
    if not content:
        program.plain(f"{path}: file is empty")
        raise Failure
    return (content * (count // len(content) + 1))[:count]


def _write_data(disk: Disk, offset: int, data: bytes, flags: set[str], *, fua: bool) -> None:
    node: Any = disk.root
    if "b" in flags:
        if not hasattr(node, "write_vmstate"):
            raise NotSupported("this format holds no VM state")
        disk.write_vmstate(offset, data)
    elif "c" in flags:
        _write_compressed(disk, offset, data)
    else:
        disk.write(offset, memoryview(data)[: room(disk, offset, len(data))], fua=fua)


def _write_compressed(disk: Disk, offset: int, data: bytes) -> None:
    from cowhand.block.format_io.compressed_writes import can_compress, write_compressed
    from cowhand.block.format_io.format_node import FormatNode

    node = disk.root
    if offset + len(data) > whole_sectors(disk.size):
        raise IOFailed("the disk ends before", path=node.filename, offset=offset, errno=errno.EIO)
    if not isinstance(node, FormatNode) or not can_compress(node):
        raise NotSupported("this format stores nothing compressed")
    write_compressed(node, disk.edge, offset, memoryview(data))


def writev(session: Session, words: Sequence[str]) -> bool:
    """Write a byte over a range from several buffers, which here are one."""
    positional: list[str] = []
    flags: set[str] = set()
    byte = DEFAULT_PATTERN
    for key, value in parsing.options(words, "CfqP:", positional, registered=True):
        if key == "P":
            byte = parsing.pattern(value)
        flags.add(key)
    if len(positional) < 2:
        raise UsageComplaint
    offset = number(positional[0])
    data = bytes([byte]) * sum(parsing.lengths(positional[1:]))
    disk = the_disk(session)
    timer = timed(session, "writev", lambda: _write_data(disk, offset, data, set(), fua="f" in flags))
    if "q" not in flags:
        statistics("wrote", timer, offset, len(data), len(data), terse="C" in flags)
    return True


def _inside(disk: Disk, offset: int, count: int) -> int:
    """Return *count* without what lies in the missing part of a last sector."""
    return disk.size - offset if offset <= disk.size < offset + count <= whole_sectors(disk.size) else count


def discard(session: Session, words: Sequence[str]) -> bool:
    """Discard a range."""
    positional: list[str] = []
    flags = {key for key, _ in parsing.options(words, "Cq", positional)}
    if len(positional) != 2:
        raise UsageComplaint
    offset, count = number(positional[0]), _limited(positional[1], "")
    disk = the_disk(session)
    timer = timed(session, "discard", lambda: disk.discard(offset, _inside(disk, offset, count)))
    if "q" not in flags:
        statistics("discard", timer, offset, count, count, terse="C" in flags)
    return True

"""What every hostile image goes through: it is described, opened, mapped, read, checked, and opened for writing and changed.

At each step an answer or a :class:`CowhandError` is right, everything else is a finding. Writing is recorded: whatever the image claims, the
guest's data must not lie on what was metadata before, its header must stay, and what was acknowledged and flushed must be read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.check.usage import usage
from cowhand.block.node.node import BlockNode
from cowhand.block.node.records import CheckResult
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import DEFAULT, UNTRUSTED
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.drivers import REGISTRY
from cowhand.image.bitmaps import add_bitmap, clear_bitmap, dirty_extents, list_bitmaps, remove_bitmap
from cowhand.image.check import check as check_image, check_node
from cowhand.image.info import chain_info, image_info
from cowhand.image.snapshots import apply_snapshot, create_snapshot, delete_snapshot, list_snapshots, open_snapshot
from cowhand.testing.recorder import DISCARD, WRITE, ZERO_RANGE, Change, RecorderNode
from tests.hostile.walk import Reader, metadata, touched

_MAX_READ = 4 << 20
_PIECE = 64 << 10
_MAX_BATCHES = 24
_MAX_ROWS = 100_000
MARK = b"[guest's bytes!]"
#: Header fields that no write changes: magic, version, backing name, cluster bits; and width of counts, header length.
_KEPT = ((0, 24), (32, 36), (96, 104))
_DIRTY, _CORRUPT = 1, 2
_LAZY = 1


class Finding(Exception):
    """Something that must not happen with any image."""


class Outcome:
    """What an image answered: by step, "ok" or the error's code."""

    def __init__(self, begin: Callable[[], None] = lambda: None) -> None:
        self.steps: dict[str, str] = {}
        self._begin = begin  #: called before each step

    def attempt(self, name: str, step: Callable[[], Any]) -> Any:
        """Do *step*; a CowhandError that tells of something is an answer. Returns None then."""
        self._begin()
        try:
            result = step()
        except CowhandError as error:
            if not error.message.strip() or not error.qemu().strip() or not str(error).strip():
                raise Finding(f"{name}: an error that says nothing: {error!r}") from error
            self.steps[name] = error.code
            return None
        self.steps[name] = "ok"
        return result


# -- looking


def look(path: Path, outcome: Outcome) -> None:
    """Describe, open, map and read the image at *path*, which may open what lies in its folder and nothing else."""
    policy = DEFAULT.within(str(path.parent))
    outcome.attempt("info", lambda: image_info(path).document())
    outcome.attempt("chain", lambda: chain_info(path, policy=policy))
    disk = outcome.attempt("open", lambda: cowhand.open(path, policy=policy))
    if disk is None:
        disk = outcome.attempt("open alone", lambda: cowhand.open(path, backing=False))
    if disk is None:
        return
    with disk:
        outcome.attempt("map", lambda: _map(disk))
        outcome.attempt("read", lambda: _read(disk))
        outcome.attempt("specific", lambda: dict(disk.root.format_specific()))
        if _has_bitmaps(disk):
            outcome.attempt("bitmaps", lambda: _read_bitmaps(disk))
            outcome.attempt("usage", lambda: _usage(disk))
        snapshots = outcome.attempt("list snapshots", lambda: list_snapshots(disk)) or []
        for number, snapshot in enumerate(snapshots[:2]):
            outcome.attempt(f"read snapshot {number}", partial(_read_snapshot, disk, snapshot.id))


def _has_bitmaps(disk: Disk) -> bool:
    directory = getattr(disk.root, "bitmap_directory", None)
    return directory is not None and (directory.present or directory.outdated)


def _read_bitmaps(disk: Disk) -> None:
    """Read the first bitmaps, and the last; what one cannot be read for is an answer."""
    try:
        known = list_bitmaps(disk)
    except CowhandError:
        return  # of a broken directory
    for bitmap in [*known[:4], *known[-1:]]:
        try:
            for _, (offset, length) in zip(range(1000), dirty_extents(disk, bitmap.name), strict=False):
                if not 0 <= offset < offset + length <= disk.size:
                    raise Finding(f"bitmap: {length} bytes at {offset} are dirty, of {disk.size}")
        except CowhandError:
            continue


def _usage(disk: Disk) -> None:
    root: Any = disk.root
    parts = usage(root)
    if sum(parts.values()) != root.file.node.size or min(parts.values()) < 0:
        raise Finding(f"usage: {parts} are not the file's {root.file.node.size} bytes")


def look_untrusted(path: Path, outcome: Outcome) -> None:
    """Open the image as a stranger's: the worker sees to it that nothing but *path* is opened."""
    disk = outcome.attempt("untrusted", lambda: cowhand.open(path, policy=UNTRUSTED))
    if disk is not None:
        disk.close()


def _read_snapshot(disk: Disk, ident: str) -> None:
    with open_snapshot(disk, ident) as view:
        _map(view)
        _read(view)


def _map(disk: Disk) -> None:
    position = rows = 0
    for batch in islice(disk.extents(), _MAX_BATCHES):
        if batch.end <= position or batch.end > disk.size:
            raise Finding(f"map: a batch ends at {batch.end}, after one that ended at {position}")
        for row in islice(batch, 2000):
            if row.start < position or not row.length:
                raise Finding(f"map: a row of {row.length} at {row.start}, after one that ended at {position}")
            position = row.end
        position = batch.end
        rows += len(batch)
        if rows > _MAX_ROWS:
            break


def _read(disk: Disk) -> None:
    size = disk.size
    for offset in _positions(size):
        disk.read(offset, min(_PIECE, size - offset))


def _positions(size: int) -> Iterator[int]:
    """Yield where to read: all of a small disk; of a large one both ends and places between them."""
    if size <= _MAX_READ:
        yield from range(0, size, _PIECE)
        return
    for i in range(8):
        yield i * _PIECE
    for i in range(1, 16):
        yield size // 16 * i // 512 * 512
    yield max(0, size - _PIECE)


# -- checking


def check(path: Path, outcome: Outcome) -> None:
    """Check the image as ``cowhand check`` does."""
    result = outcome.attempt("check", lambda: check_image(path, format="qcow2"))
    if result is not None and result.failure is not None:
        outcome.steps["check"] = result.failure.code
    if result is not None and any("bitmap directory" in line for line in result.messages):
        outcome.attempt("repair", lambda: _repair(path))


def repair(path: Path, outcome: Outcome) -> None:
    """Repair the image where it is, its leaks first and then everything, and check it again."""
    for how in ("leaks", "all"):
        result = outcome.attempt(f"repair {how}", partial(_repaired_in_place, path, how))
        if result is not None and result.failure is not None:
            outcome.steps[f"repair {how}"] = result.failure.code
    outcome.attempt("check again", lambda: check_image(path, format="qcow2"))


def _repaired_in_place(path: Path, how: str) -> CheckResult:
    opening = Opening(REGISTRY, policy=UNTRUSTED, backing=False)
    opening.for_repair = True
    file = {"driver": "file", "filename": str(path)}
    root: Any = opening.open({"driver": "qcow2", "file": file, "read-only": False})
    with Disk(root, writable=True):
        return check_node(root, repair=how)


def _repair(path: Path) -> None:
    """Repair a copy of the image, whose bitmaps are broken: if that is said to have succeeded, they are sound afterwards."""
    keeper = Disk(MemoryNode(content=path.read_bytes()))
    try:
        opening = Opening(REGISTRY, policy=UNTRUSTED, backing=False)
        opening.for_repair = True
        root: Any = opening.open({"driver": "qcow2", "file": keeper.root, "read-only": False})
        with Disk(root, writable=True):
            result = check_node(root, repair="all")
        if result.clean:
            with _open(keeper.root, None, writable=False) as again:
                reopened: Any = again.root
                if reopened.bitmap_directory.broken:
                    raise Finding("repair: the bitmap directory is broken still")
    finally:
        keeper.close()


# -- changing


def change(path: Path, recorder: RecorderNode | None, base: bytes | None, outcome: Outcome) -> None:
    """Open the image for writing, over *recorder* or where it is, change it in every way, and look what became of it."""
    if recorder is None:
        _change(str(path), None, base, outcome)
        return
    keeper = Disk(recorder, name="keeper")  # holds the medium when the image closes it
    try:
        _change(recorder, recorder, base, outcome)
    finally:
        keeper.close()


def _open(file: Any, base: bytes | None, *, writable: bool) -> Disk:
    """Open the image in *file*, a node or a path, over *base*."""
    backing = None if base is None else {"driver": "raw", "file": MemoryNode(content=base)}
    if isinstance(file, str):
        file = {"driver": "file", "filename": file}
    description = {"driver": "qcow2", "file": file, "backing": backing, "read-only": not writable, "discard": "unmap"}
    # A stranger's image: what it names beside the given base is not opened.
    opening = Opening(REGISTRY, policy=UNTRUSTED)
    root = opening.open(description)
    try:
        return Disk(root, writable=writable)
    except CowhandError:
        opening.abandon()
        raise


def _change(file: Any, recorder: RecorderNode | None, base: bytes | None, outcome: Outcome) -> None:
    before = _beginning(file)
    disk = outcome.attempt("open to write", lambda: _open(file, base, writable=True))
    if disk is None:
        return
    try:
        for name, step in _changes(disk):
            _watched(recorder, name, step, outcome)
        kept = _last_write(recorder, disk, outcome)
    finally:
        outcome.attempt("close", disk.close)
    _header_stands(before, _beginning(file))
    if kept is not None and outcome.steps["close"] == "ok":
        with _open(file, base, writable=False) as again:
            if again.read(kept, len(MARK)) != MARK:
                raise Finding(
                    f"bytes written at {kept:#x}, flushed without an error, are not there after closing and opening"
                )


def _beginning(file: Any) -> bytes:
    if isinstance(file, str):
        with open(file, "rb") as opened:
            return opened.read(112).ljust(112, b"\0")
    return _reader(file.inner)(0, 112)


def _changes(disk: Disk) -> Iterator[tuple[str, Callable[[], Any]]]:
    root: Any = disk.root
    unit, size = root.cluster_size, disk.size
    table = unit * unit // 8

    def write(offset: int, length: int) -> Callable[[], None]:
        offset = max(0, min(offset, size - length))
        length = min(length, size - offset)
        return lambda: disk.write(offset, (MARK * (length // 16 + 1))[:length])

    for number in (0, 2, 3, 5, 6, 7, 8, 9):
        yield f"write cluster {number}", write(number * unit, unit)
    yield "write part of a cluster", write(10 * unit + unit // 4, unit // 2)
    yield "write in table 1", write(table + unit, 2 * unit)
    yield "write in table 2", write(2 * table + 3 * unit + 5, unit)
    yield "write the end", write(size, unit)
    yield "zero", lambda: disk.write_zeroes(0, min(size, 3 * unit), unmap=True)
    yield "zero, keeping space", lambda: disk.write_zeroes(min(size, 3 * unit), min(unit, size - min(size, 3 * unit)))
    yield "discard", lambda: disk.discard(0, min(size, table + 4 * unit))
    yield "flush", disk.flush
    for number in (0, 4, 11, 12, 13):
        yield f"write cluster {number} again", write(number * unit, unit)
    yield "flush again", disk.flush
    yield "snapshot", lambda: create_snapshot(disk, "new")
    yield "write after the snapshot", write(2 * unit, unit)
    yield "flush after the snapshot", disk.flush
    if _has_bitmaps(disk):
        yield "add a bitmap", lambda: add_bitmap(disk, "new")
        for step in (clear_bitmap, remove_bitmap):
            for bitmap in _first_bitmap(disk):
                yield step.__name__, partial(step, disk, bitmap.name)
        yield "write after the bitmap", write(3 * unit, unit)
        yield "flush after the bitmap", disk.flush
    yield "apply a snapshot", lambda: _with_first(disk, apply_snapshot)
    yield "write after applying", write(3 * unit, 2 * unit)
    yield "delete a snapshot", lambda: _with_first(disk, delete_snapshot)
    yield "write after deleting", write(0, 4 * unit)
    size = disk.size
    yield "grow", lambda: disk.resize(size + 3 * table) if size < 1 << 60 else None


def _first_bitmap(disk: Disk) -> list[Any]:
    """Return the first bitmap; none where the directory is broken, which is told otherwise."""
    try:
        return list(list_bitmaps(disk)[:1])
    except CowhandError:
        return []


def _with_first(disk: Disk, step: Callable[[Disk, str], Any]) -> None:
    for snapshot in list_snapshots(disk)[:1]:
        step(disk, snapshot.id)


def _last_write(recorder: RecorderNode | None, disk: Disk, outcome: Outcome) -> int | None:
    """Write once more, and flush; return the offset of bytes that must be there from now on, or None."""
    offset = min(disk.size // 2, 5 * disk.root.limits.zero_alignment) // 512 * 512
    if offset + len(MARK) > disk.size:
        return None
    _watched(recorder, "last write", lambda: disk.write(offset, MARK), outcome)
    _watched(recorder, "last flush", disk.flush, outcome)
    return offset if outcome.steps["last write"] == outcome.steps["last flush"] == "ok" else None


def _watched(recorder: RecorderNode | None, name: str, step: Callable[[], Any], outcome: Outcome) -> None:
    """Do *step* and look at what it did to the medium, which holds the metadata that it held before."""
    if recorder is None:
        outcome.attempt(name, step)
        return
    inner = recorder.inner
    assert isinstance(inner, MemoryNode)
    medium = inner.copy()
    regions = metadata(_reader(medium))
    begin = len(recorder.log.changes)
    outcome.attempt(name, step)
    changes = recorder.log.changes[begin:]
    for number, done in enumerate(changes):
        if _guests(done) and touched(regions, done.offset, done.length):
            # A step may free a table and use its place: what counts are the tables at that moment.
            now = medium.copy()
            for earlier in changes[:number]:
                earlier.apply(now)
            region = touched(metadata(_reader(now)), done.offset, done.length)
            if region is not None:
                raise Finding(f"{name}: {done!r} hits the {region.name} at {region.begin:#x}")


def _guests(change: Change) -> bool:
    """Tell whether *change* puts, or takes away, a guest's data."""
    return change.kind in (ZERO_RANGE, DISCARD) or (change.kind == WRITE and MARK in change.data)


def _header_stands(before: bytes, after: bytes) -> None:
    end = 104 if before[7] >= 3 else 72
    for begin, stop in _KEPT:
        if begin < end and before[begin:stop] != after[begin:stop]:
            raise Finding(
                f"header bytes {begin} to {stop} were {before[begin:stop].hex()} and are {after[begin:stop].hex()}"
            )
    if end > 72:
        was, now = (int.from_bytes(data[72:80], "big") for data in (before, after))
        # With lazy reference counts an image that could not be closed in order stays dirty.
        may_come = _CORRUPT | (_DIRTY if before[87] & _LAZY else 0)
        if now & ~was & ~may_come or was & ~now & ~_DIRTY:
            raise Finding(f"incompatible features were {was:#x} and are {now:#x}")


def _reader(node: BlockNode) -> Reader:
    def read(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        if offset < 1 << 62:
            node.read_into(offset, buffer)
        return bytes(buffer)

    return read


__all__ = ["MARK", "Finding", "Outcome", "change", "check", "look", "look_untrusted", "repair"]

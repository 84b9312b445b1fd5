"""The undo log of a repair: our own format. Written and made stable before the image is changed; checked before it is applied.

    line 1      "cowhand undo log 1"
    line 2      JSON: the image's name, its sizes before, meanwhile and after, the ranges that are changed ("changed", [begin, end] each),
                and those that were read and not changed ("kept") with the SHA-256 of their bytes ("kept-sha256")
    bytes       what the changed ranges held before, one behind the other; beyond the end of the file zeroes
    versions    for each sector of the changed ranges: a byte with their number, then 8 bytes of BLAKE2b of every content it was given
    32 bytes    SHA-256 of all that is above
    lines       what happened since, each between two newlines: "done MTIME_NS" when the repair was complete, "undoing" before the first
                byte is put back, "undone" when all is; one that a crash cut off counts for nothing

A log that ends before its SHA-256 belongs to a repair that had not begun. Whatever a crash left of a repair, or of its undoing, each sector
has one of the contents that the log knows; then everything is put back. Any other content means that somebody wrote to the image since.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from cowhand.block.disk import Disk
from cowhand.block.node.node import CONSISTENT_READ
from cowhand.core.errors import CowhandError, ImageExists, InvalidFormat, NotSupported, from_os_error
from cowhand.image.new_file import NewFile
from cowhand.image.shadow.recording import FLUSH, RESIZE, SECTOR, WRITE, RehearsalNode

_MAGIC = b"cowhand undo log 1\n"
_PIECE = 1 << 20
_MAX_HEADER = 64 << 20
_VERSION_BYTES = 8


class ImageChanged(CowhandError):
    """The image is not as a repair left it, so the repair cannot be undone."""

    code = "image-changed"
    exit_code = 9


class UndoLogUsed(CowhandError):
    """The repair that the log tells of was undone already; what the image holds now is something else."""

    code = "undo-log-used"
    exit_code = 9


def open_file(path: str) -> Disk:
    """Open the file or device *path* for writing, so that nobody else writes it. Raises ImageInUse, ImageNotFound and its like."""
    from cowhand.block.opening.opening import Opening
    from cowhand.drivers import REGISTRY

    opening = Opening(REGISTRY)
    device = not os.path.isfile(path) and os.path.exists(path)
    node = opening.open({"driver": "host_device" if device else "file", "filename": path, "read-only": False})
    try:
        disk = Disk(node, writable=True)
    except BaseException:
        opening.abandon()
        raise
    try:
        disk.share(CONSISTENT_READ)
    except BaseException:
        disk.close()
        raise
    return disk


def _pieces(disk: Disk, begin: int, end: int) -> Iterator[bytes]:
    while begin < end:
        buffer = bytearray(min(_PIECE, end - begin))
        disk.edge.read_into(begin, buffer)
        yield bytes(buffer)
        begin += len(buffer)


def _digest(disk: Disk, ranges: list[Any]) -> str:
    digest = hashlib.sha256()
    for begin, end in ranges:
        for piece in _pieces(disk, begin, end):
            digest.update(piece)
    return digest.hexdigest()


def _short(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_VERSION_BYTES).digest()


def write_log(path: str, disk: Disk, image: str, rehearsal: RehearsalNode) -> None:
    """Write the log of what *rehearsal* would change of *disk* to the new *path*, stably. Raises ImageExists, IOFailed, NoSpace, NotSupported."""
    kept, changed = list(rehearsal.only_read()), list(rehearsal.written())
    sizes = [disk.root.size, *(step.length for step in rehearsal.steps if step.kind == RESIZE), rehearsal.size]
    sizes += [min(rehearsal.size, step.offset + step.length) for step in rehearsal.steps if step.kind == WRITE]
    header = {
        "image": os.path.abspath(image),
        "size": disk.root.size,
        "sizes": sorted({size for size in sizes if size >= disk.root.size}),
        "changed": changed,
        "kept": kept,
        "kept-sha256": _digest(disk, kept),
    }
    line = json.dumps(header).encode() + b"\n"
    if len(line) > _MAX_HEADER:
        # Nobody could read it again, and so nothing could be undone.
        raise NotSupported(
            f"the repair looks at so many places ({len(kept) + len(changed)}) that no undo log holds them", path=image,
            hint="Repair it without a log (--no-log), on a copy.",
        )  # fmt: skip
    versions: dict[int, list[bytes]] = {}
    for step in rehearsal.steps:
        if step.kind == WRITE:
            content = rehearsal.content(step)
            for at in range(0, step.length, SECTOR):
                versions.setdefault((step.offset + at) // SECTOR, []).append(_short(content[at : at + SECTOR]))
    try:
        # Nothing is repaired yet: a part of a log would only be in the way of the next one, so it has its name when it is whole.
        with NewFile(path) as new, open(new.descriptor, "wb", closefd=False) as file:
            digest = hashlib.sha256()
            for piece in _log_pieces(disk, line, changed, versions):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
            _stable(file)
            new.appear(durable=True)
    except ImageExists as error:
        raise ImageExists(f"'{path}' exists", path=path, hint="Choose another name for the log (--log).") from error
    except OSError as error:
        raise from_os_error(error, path, doing="writing the undo log") from error


def _log_pieces(
    disk: Disk, header: bytes, changed: list[tuple[int, int]], versions: dict[int, list[bytes]]
) -> Iterator[bytes]:
    yield _MAGIC + header
    for begin, end in changed:
        yield from _pieces(disk, begin, end)
    for begin, end in changed:
        for sector in range(begin // SECTOR, end // SECTOR):
            known = list(dict.fromkeys(versions[sector]))[-255:]
            yield bytes([len(known)]) + b"".join(known)


def _stable(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def note(path: str, line: str) -> None:
    """Add *line* to the log at *path*, stably."""
    try:
        with open(path, "ab") as file:
            file.write(b"\n" + line.encode() + b"\n")
            _stable(file)
    except OSError as error:
        raise from_os_error(error, path, doing="writing the undo log") from error


def play(disk: Disk, rehearsal: RehearsalNode) -> None:
    """Do to *disk* what *rehearsal* did to itself: the same writes in the same order, with the same flushes."""
    for step in rehearsal.steps:
        if step.kind == WRITE:
            disk.edge.write(step.offset, (rehearsal.content(step),))
        elif step.kind == RESIZE:
            disk.root.resize(step.length)
        elif step.kind == FLUSH:
            disk.edge.flush()
    disk.edge.flush()


class UndoLog:
    """A log that was read and found whole. Raises InvalidFormat for what is none, ImageChanged from :meth:`verify`."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._read(file)
        except OSError as error:
            raise from_os_error(error, path, doing="reading the undo log") from error

    def _read(self, file: BinaryIO) -> None:
        if file.readline(len(_MAGIC)) != _MAGIC:
            raise InvalidFormat("this is not an undo log", path=self.path, offset=0)
        line = file.readline(_MAX_HEADER)
        header = _header(line, self.path)
        self.image: str = header["image"]
        self.size: int = header["size"]
        self.sizes: list[int] = header["sizes"]
        self.changed: list[tuple[int, int]] = header["changed"]
        self.kept: list[tuple[int, int]] = header["kept"]
        self._kept_digest: str = header["kept-sha256"]
        self._data = file.tell()
        digest = hashlib.sha256(_MAGIC + line)
        left = sum(end - begin for begin, end in self.changed)
        sectors = left // SECTOR
        while left:
            piece = self._take(file, min(_PIECE, left))
            digest.update(piece)
            left -= len(piece)
        self._versions: list[bytes] = []
        for _ in range(sectors):
            count = self._take(file, 1)
            known = self._take(file, count[0] * _VERSION_BYTES)
            digest.update(count + known)
            self._versions.append(known)
        if self._take(file, 32) != digest.digest():
            raise InvalidFormat("the undo log is damaged: its checksum is wrong", path=self.path)
        self.notes = file.read(_PIECE).decode("ascii", "replace").split("\n")[:-1]

    def _take(self, file: BinaryIO, length: int) -> bytes:
        data = file.read(length)
        if len(data) < length:
            raise InvalidFormat(
                "the undo log is not complete: the repair had not begun, so there is nothing to undo", path=self.path
            )
        return data

    def check_unused(self) -> None:
        """Raise UndoLogUsed when the repair was undone completely: since then the image has a life of its own."""
        if "undone" in self.notes:
            raise UndoLogUsed(
                f"the repair of '{self.image}' was undone with this log already", path=self.path,
                hint="There is nothing more to undo with it: it can be deleted. A new repair writes a new log.",
            )  # fmt: skip

    def verify(self, disk: Disk, modified: int | None, *, force: bool = False) -> bool:
        """Look whether *disk* is as the repair left it, even in the middle; False when it is as before the repair, all of it.

        *modified* is the file's time of modification in ns, None where it has none; with *force* it does not matter. Raises ImageChanged.
        """
        # A write behind the end of which only a part was done leaves a size in between.
        if not self.size <= disk.root.size <= max(self.sizes):
            raise self._changed(f"it has {disk.root.size} bytes")
        before = disk.root.size == self.size
        with open(self.path, "rb") as file:
            file.seek(self._data)
            number = 0
            for begin, end in self.changed:
                for piece in _pieces(disk, begin, end):
                    old = self._take(file, len(piece))
                    for at in range(0, len(piece), SECTOR):
                        now = piece[at : at + SECTOR]
                        if now != old[at : at + SECTOR]:
                            before = False
                            if not self._known(number, now):
                                raise self._changed(f"sector {(begin + at):#x} is new")
                        number += 1
                    begin += len(piece)
        if _digest(disk, self.kept) != self._kept_digest:
            raise self._changed("tables that the repair left alone are new")
        done = [line.removeprefix("done ") for line in self.notes if line.startswith("done ")]
        if not before and not force and done and "undoing" not in self.notes and modified is not None:
            if done[-1] != str(modified):
                raise self._changed(
                    "it was written after the repair", hint="If only its time is new (a copy), insist with --force."
                )
        return not before

    def _known(self, number: int, content: bytes) -> bool:
        known, short = self._versions[number], _short(content)
        return any(known[at : at + _VERSION_BYTES] == short for at in range(0, len(known), _VERSION_BYTES))

    def _changed(self, why: str, hint: str | None = None) -> ImageChanged:
        return ImageChanged(
            f"the image was changed since the repair ({why}): to undo it now would destroy that",
            path=self.image,
            hint=hint,
        )

    def apply(self, disk: Disk) -> None:
        """Put everything back that the repair changed. After a crash in the middle it can be done again."""
        with open(self.path, "rb") as file:
            file.seek(self._data)
            for begin, end in self.changed:
                stop = min(end, self.size)
                for position in range(begin, end, _PIECE):
                    piece = self._take(file, min(_PIECE, end - position))[: max(0, stop - position)]
                    if piece:
                        disk.edge.write(position, (piece,))
        disk.edge.flush()
        if disk.root.size > self.size:
            disk.root.resize(self.size, shrink=True)
        disk.edge.flush()


def _header(line: bytes, path: str) -> dict[str, Any]:
    """Return the header of a log. Raises InvalidFormat unless it is one: ranges rise and consist of whole sectors where they are changed."""
    wrong = InvalidFormat("the undo log's header is damaged, or not complete", path=path, offset=len(_MAGIC))
    try:
        found: dict[str, Any] = json.loads(line)
        ranges = {name: [(int(begin), int(end)) for begin, end in found[name]] for name in ("changed", "kept")}
        sound = isinstance(found["image"], str) and isinstance(found["kept-sha256"], str) and int(found["size"]) >= 0
        sound = sound and isinstance(found["sizes"], list) and found["size"] in found["sizes"]
        sound = sound and all(isinstance(size, int) for size in found["sizes"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise wrong from None
    for name, rows in ranges.items():
        last = 0
        for begin, end in rows:
            sound = sound and last <= begin < end and not (name == "changed" and (begin | end) % SECTOR)
            last = end
    if not sound:
        raise wrong
    return {**found, **ranges}

"""What a fuzzed image goes through: opened, mapped, read, checked, repaired, written; anything but an answer or a CowhandError is a finding.

So is a step that takes more time or memory than its budget. Everything happens in memory:
what the image names is not opened, and no file of the machine is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any
from unittest import mock

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.check.usage import usage
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import UNTRUSTED
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.crypto import secrets, volume
from cowhand.drivers import REGISTRY
from cowhand.image.bitmaps import dirty_extents, list_bitmaps
from cowhand.image.check import check_node
from tests.fuzz.budget import budget
from tests.fuzz.mutation import regions_of

#: Of a large disk, so many pieces are read, and so many batches of the map.
_PIECE = 32 << 10
_PIECES = 16
_BATCHES = 8
#: Fields of a qcow2 header: offset and bytes (QEMU ``docs/interop/qcow2``).
_VERSION, _CRYPT_METHOD, _INCOMPATIBLE = (4, 4), (32, 4), (72, 8)
_DATA_FILE, _DATA_FILE_SINCE = 1 << 2, 3
#: Bytes of a data file at most; the data of a longer disk is lost.
_MAX_DATA_FILE = 16 << 20
MARK = b"written by the fuzzer"
#: Opens the encrypted images of the corpus.
SECRET = "fuzz"
PASSPHRASE = b"correct horse"


class Steps:
    """Does the steps of one input, each within its budget. ``answers``: what each said, "ok" or an error's code."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}

    def attempt(self, name: str, step: Callable[[], None]) -> bool:
        """Do *step*; return whether it succeeded. Raises Finding, Exceeded, and whatever it raises that is no CowhandError."""
        try:
            with budget(name):
                step()
        except CowhandError as error:
            if not str(error).strip() or not error.qemu().strip():
                raise Finding(f"{name}: an error that says nothing: {error!r}") from error
            self.answers[name] = error.code
            return False
        self.answers[name] = "ok"
        return True


class Finding(Exception):
    """Something that must not happen with any image, although no foreign exception was raised."""


def exercise(data: bytes, driver: str = "qcow2") -> dict[str, str]:
    """Do everything with an image of these bytes; return what each step answered, "ok" or an error's code."""
    steps = Steps()
    with secrets.given({SECRET: PASSPHRASE}), remembered():
        if steps.attempt("read", lambda: read_all(data, driver)) or len(data) > 512:
            steps.attempt("check", lambda: _check(data, driver))
            for repair in ("leaks", "all"):
                steps.attempt(f"repair {repair}", lambda repair=repair: _repair(data, driver, repair))  # type: ignore[misc]
            steps.attempt("write", lambda: write_and_read(data, driver))
    return steps.answers


@contextmanager
def remembered() -> Iterator[None]:
    """Derive each key once, however often and in how many inputs it is asked for: otherwise that takes most of the time."""
    with mock.patch.object(volume, "merge", _merge), mock.patch.object(volume, "pbkdf2", _pbkdf2):
        yield


_merge = lru_cache(maxsize=64)(volume.merge)
_pbkdf2 = lru_cache(maxsize=1024)(volume.pbkdf2)


class Medium:
    """The files of one image, in memory: its own, and one that takes the guest's data where the image says that it lies apart."""

    def __init__(self, data: bytes) -> None:
        self.file = MemoryNode(content=data)
        # As long as the disk: what a table names and the file does not have is damage.
        size = int.from_bytes(data[24:32], "big")
        self.data_file = MemoryNode(content=bytes(size if size <= _MAX_DATA_FILE else 0))
        # Images close what they stand on; these hold it.
        self._keepers = [Disk(node, name="keeper") for node in (self.file, self.data_file)]

    def __enter__(self) -> Medium:
        return self

    def __exit__(self, *ignored: object) -> None:
        for keeper in self._keepers:
            keeper.close()

    def _header(self, offset: int, length: int) -> int:
        field = bytearray(length)
        if self.file.size >= offset + length:
            self.file.read_into(offset, field)
        return int.from_bytes(field, "big")

    def open(self, driver: str, *, writable: bool = False, for_repair: bool = False) -> Disk:
        """Open the image, with the corpus's passphrase where it is encrypted; nothing that it names is opened."""
        opening = Opening(REGISTRY, UNTRUSTED, backing=False)
        opening.for_repair = for_repair
        description: dict[str, Any] = {"driver": driver, "file": self.file, "read-only": not writable}
        if driver == "luks":
            description["key-secret"] = SECRET
        else:
            if self._header(*_CRYPT_METHOD):
                description["encrypt"] = {"key-secret": SECRET}
            if self._header(*_INCOMPATIBLE) & _DATA_FILE and self._header(*_VERSION) >= _DATA_FILE_SINCE:
                description["data-file"] = self.data_file
        root = opening.open(description)
        try:
            return Disk(root, writable=writable)
        except BaseException:
            opening.abandon()
            raise


def read_all(data: bytes, driver: str) -> None:
    """Open, map, and read from all over the disk."""
    with Medium(data) as medium, medium.open(driver) as disk:
        position = 0
        for batch in islice(disk.extents(), _BATCHES):
            for row in batch:
                if row.start < position or not row.length or row.end > disk.size:
                    raise Finding(f"map: {row.length} bytes at {row.start}, after what ended at {position}")
                position = row.end
        step = max(_PIECE, disk.size // _PIECES)
        for offset in range(0, disk.size, step):
            disk.read(offset, min(_PIECE, disk.size - offset))
        dict(disk.root.format_specific())
        _look_inside(disk)


def _look_inside(disk: Disk) -> None:
    """Read the bitmaps, and find out what the file's bytes are used for."""
    for bitmap in list_bitmaps(disk)[:8]:
        try:
            dirty = list(islice(dirty_extents(disk, bitmap.name), 1000))
        except CowhandError:
            continue  # it says why it cannot be used
        if any(not 0 <= offset < offset + length <= disk.size for offset, length in dirty):
            raise Finding(f"a bitmap has dirty what is not in the disk: {dirty[-1]}")
    root: Any = disk.root
    if root.driver == "qcow2":
        parts = usage(root)
        if sum(parts.values()) != root.file.node.size or min(parts.values()) < 0:
            raise Finding(f"the file of {root.file.node.size} bytes is used for {parts}")


def _check(data: bytes, driver: str) -> None:
    with Medium(data) as medium, medium.open(driver, for_repair=True) as disk:
        result = check_node(disk.root)
        if min(result.corruptions, result.leaks, result.check_errors) < 0:
            raise Finding(f"check counts less than nothing: {result!r}")


def _repair(data: bytes, driver: str, repair: str) -> None:
    with Medium(data) as medium:
        with medium.open(driver, writable=True, for_repair=True) as disk:
            result = check_node(disk.root, repair=repair)
        if result.failure is not None:
            return
        with medium.open(driver, for_repair=True) as disk:
            again = check_node(disk.root)
        if again.failure is None and again.corruptions > result.corruptions and not _tangled(data):
            raise Finding(f"repair said {result!r}, and then there is {again!r}")


def _tangled(data: bytes) -> bool:
    """Tell whether tables of the image lie over one another: then to mend the one, or only to close the image, is to change the other."""
    regions = sorted(set(regions_of(data)), key=lambda region: (region.begin, region.end))
    return any(before.end > after.begin for before, after in pairwise(regions))


def write_and_read(data: bytes, driver: str) -> None:
    """Write into the middle, flush, open again and read."""
    with Medium(data) as medium:
        with medium.open(driver, writable=True) as disk:
            offset = max(0, disk.size // 2 - len(MARK)) // 512 * 512
            if offset + len(MARK) > disk.size:
                return
            disk.write(offset, MARK)
            disk.flush()
        with medium.open(driver) as disk:
            if disk.read(offset, len(MARK)) != MARK:
                raise Finding(f"what was written at {offset} and flushed is not there")

"""What a fuzzed image goes through: opened, mapped, read, checked, repaired, checked again; anything but an answer or a CowhandError is a finding.

Everything happens in memory: what the image names is not opened, and no file of the machine is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from cowhand.block.check import check_node
from cowhand.block.disk import Disk
from cowhand.block.opening import Opening
from cowhand.block.policy import UNTRUSTED
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.drivers import REGISTRY

#: Of a large disk, so many pieces are read, and so many batches of the map.
_PIECE = 32 << 10
_PIECES = 16
_BATCHES = 8
MARK = b"written by the fuzzer"


class Finding(Exception):
    """Something that must not happen with any image, although no foreign exception was raised."""


def exercise(data: bytes, driver: str = "qcow2") -> dict[str, str]:
    """Do everything with an image of these bytes; return what each step answered, "ok" or an error's code.

    Raises Finding, or whatever the library raises that is no CowhandError.
    """
    answers: dict[str, str] = {}

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
            answers[name] = "ok"
        except CowhandError as error:
            if not str(error).strip() or not error.qemu().strip():
                raise Finding(f"{name}: an error that says nothing: {error!r}") from error
            answers[name] = error.code

    attempt("read", lambda: _read(data, driver))
    if answers["read"] == "ok" or len(data) > 512:
        attempt("check", lambda: _check(data, driver))
        for repair in ("leaks", "all"):
            attempt(f"repair {repair}", lambda repair=repair: _repair(data, driver, repair))  # type: ignore[misc]
        attempt("write", lambda: _write(data, driver))
    return answers


def _open(file: MemoryNode, driver: str, *, writable: bool, for_repair: bool = False) -> Disk:
    opening = Opening(REGISTRY, UNTRUSTED, backing=False)
    opening.for_repair = for_repair
    description: dict[str, Any] = {"driver": driver, "file": file, "read-only": not writable}
    root = opening.open(description)
    try:
        return Disk(root, writable=writable)
    except BaseException:
        opening.abandon()
        raise


def _read(data: bytes, driver: str) -> None:
    with _open(MemoryNode(content=data), driver, writable=False) as disk:
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


def _check(data: bytes, driver: str) -> None:
    with _open(MemoryNode(content=data), driver, writable=False, for_repair=True) as disk:
        result = check_node(disk.root)
        if min(result.corruptions, result.leaks, result.check_errors) < 0:
            raise Finding(f"check counts less than nothing: {result!r}")


def _repair(data: bytes, driver: str, repair: str) -> None:
    medium = MemoryNode(content=data)
    keeper = Disk(medium, name="keeper")  # holds the medium when the image closes it
    try:
        with _open(medium, driver, writable=True, for_repair=True) as disk:
            result = check_node(disk.root, repair=repair)
        if result.failure is not None:
            return
        with _open(medium, driver, writable=False, for_repair=True) as disk:
            again = check_node(disk.root)
        if again.failure is None and again.corruptions > result.corruptions:
            raise Finding(f"repair said {result!r}, and then there is {again!r}")
    finally:
        keeper.close()


def _write(data: bytes, driver: str) -> None:
    medium = MemoryNode(content=data)
    keeper = Disk(medium, name="keeper")
    try:
        with _open(medium, driver, writable=True) as disk:
            offset = max(0, disk.size // 2 - len(MARK)) // 512 * 512
            if offset + len(MARK) > disk.size:
                return
            disk.write(offset, MARK)
            disk.flush()
        with _open(medium, driver, writable=False) as disk:
            if disk.read(offset, len(MARK)) != MARK:
                raise Finding(f"what was written at {offset} and flushed is not there")
    finally:
        keeper.close()

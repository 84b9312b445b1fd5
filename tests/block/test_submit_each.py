"""A batch whose requests have a result each: what one does wrong is its own error, the others are done, once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.node.node import (
    DISCARD,
    FLUSH,
    READ,
    WRITE_REQUEST,
    ZERO_REQUEST,
    ZERO_UNMAP,
    BlockNode,
    Request,
    Zeroing,
)
from cowhand.block.opening.opening import Opening
from cowhand.core.errors import Closed, IOFailed, OutOfRange, ReadOnly
from cowhand.drivers import REGISTRY

SIZE = 1 << 20
UNIT = 65536


def errors_at(path: Path, sector: int, event: str, *, format: str = "raw", **more: Any) -> Disk:
    """Open *path* over a blkdebug node that fails *event* where *sector* of the file is touched."""
    rule = {"event": event, "errno": errno.EIO, "sector": sector, **more}
    below = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, "inject-error": [rule]}
    root = Opening(REGISTRY).open({"driver": format, "file": below})
    return Disk(root, writable=True)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes([7]) * SIZE)
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    cowhand.create(path, "qcow2", SIZE)
    return path


def test_a_batch_without_errors_does_what_submit_does(raw: Path) -> None:
    buffer = bytearray(100)
    with cowhand.open(raw, writable=True, format="raw") as disk:
        batch: list[Request] = [
            (WRITE_REQUEST, 4096, b"w" * 512),
            (ZERO_REQUEST, 8192, 512),
            (READ, 100, buffer),
            (FLUSH, 0, 0),
        ]
        assert disk.submit_each(batch) == {}
        assert disk.read(4096, 512) == b"w" * 512
        assert disk.read(8192, 512) == bytes(512)
        assert buffer == bytes([7]) * 100
        assert disk.counters()["write"] == {"requests": 1, "bytes": 512}
        assert disk.submit_each([]) == {}


def test_a_wrong_range_is_the_error_of_its_request_alone(raw: Path) -> None:
    buffer = bytearray(4)
    with cowhand.open(raw, writable=True, format="raw") as disk:
        batch: list[Request] = [
            (READ, SIZE - 1, bytearray(2)),
            (WRITE_REQUEST, 0, b"x" * 4),
            (WRITE_REQUEST, -1, b"x"),
            (DISCARD, SIZE, 1),
            (READ, 8, buffer),
        ]
        failures = disk.submit_each(batch)
        assert {index: type(error) for index, error in failures.items()} == {
            0: OutOfRange,
            2: OutOfRange,
            3: OutOfRange,
        }
        assert disk.read(0, 4) == b"xxxx"
        assert buffer == bytes([7]) * 4
        assert disk.counters()["discard"]["requests"] == 0


def test_changes_of_a_read_only_disk_fail_and_reads_do_not(raw: Path) -> None:
    buffer = bytearray(4)
    with cowhand.open(raw, format="raw") as disk:
        failures = disk.submit_each(
            [(WRITE_REQUEST, 0, b"x"), (READ, 0, buffer), (ZERO_UNMAP, 0, 1), (FLUSH, 0, 0)], stable=(0, 2)
        )
    assert {index: type(error) for index, error in failures.items()} == {0: ReadOnly, 2: ReadOnly}
    assert buffer == bytes([7]) * 4


def test_a_closed_disk_raises(raw: Path) -> None:
    disk = cowhand.open(raw, format="raw")
    disk.close()
    with pytest.raises(Closed):
        disk.submit_each([(READ, 0, bytearray(1))])


@pytest.mark.parametrize("event", ["read_aio", "write_aio"])
def test_an_error_below_a_raw_image_names_its_request(raw: Path, event: str) -> None:
    with errors_at(raw, 2, event) as disk:
        buffers = [bytearray(512) for _ in range(5)]
        batch: list[Request] = [
            (READ, number * 512, buffers[number])
            if event == "read_aio"
            else (WRITE_REQUEST, number * 512, bytes([number]) * 512)
            for number in range(5)
        ]
        assert {index: type(error) for index, error in disk.submit_each(batch).items()} == {2: IOFailed}
    content = raw.read_bytes()
    for number in (0, 1, 3, 4):
        if event == "read_aio":
            assert buffers[number] == bytes([7]) * 512
        else:
            assert content[number * 512 : number * 512 + 512] == bytes([number]) * 512


def test_an_error_of_a_first_write_names_its_request(qcow2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cowhand.block.format_io import batch_data
    from cowhand.block.protocols.file import data

    real = os.pwritev

    def fails_with_c(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if any(bytes(buffer[:1]) == b"C" for buffer in buffers):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(batch_data, "_pwritev", fails_with_c)
    monkeypatch.setattr(data, "_pwritev", fails_with_c)
    with cowhand.open(qcow2, writable=True) as disk:
        batch: list[Request] = [(WRITE_REQUEST, number * UNIT, bytes([65 + number]) * UNIT) for number in range(4)]
        failures = disk.submit_each(batch)
        assert {index: type(error) for index, error in failures.items()} == {2: IOFailed}
    with cowhand.open(qcow2) as disk:
        for number in range(4):
            assert disk.read(number * UNIT, UNIT) == (bytes([65 + number]) if number != 2 else b"\0") * UNIT
    assert cowhand.check(qcow2).corruptions == 0


def test_requests_side_by_side_in_a_file_are_blamed_one_by_one(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cowhand.block.protocols.file import data

    real = data._pwritev

    def fails_at_1024(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if offset <= 1024 < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "Input/output error")
        return int(real(descriptor, buffers, offset, *flags))

    with cowhand.open({"driver": "file", "filename": str(raw)}, writable=True) as disk:
        monkeypatch.setattr(data, "_pwritev", fails_at_1024)
        failures = disk.submit_each([(WRITE_REQUEST, number * 512, b"n" * 512) for number in range(4)])
    assert list(failures) == [2]
    assert raw.read_bytes()[:2048] == b"n" * 1024 + bytes([7]) * 512 + b"n" * 512


class Flushes:
    """Counts the flushes of a node, and may let them fail."""

    def __init__(
        self, node: BlockNode, monkeypatch: pytest.MonkeyPatch, disk: Disk, error: Exception | None = None
    ) -> None:
        self.count = 0
        real = node.flush

        def flush() -> None:
            self.count += 1
            if error is not None:
                raise error
            real()

        monkeypatch.setattr(disk.edge, "flush", flush)


def test_one_flush_makes_those_stable_that_are_to_be(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cowhand.open(raw, writable=True, format="raw") as disk:
        flushes = Flushes(disk.root, monkeypatch, disk)
        batch: list[Request] = [
            (WRITE_REQUEST, 0, b"x"),
            (WRITE_REQUEST, SIZE, b"x"),
            (ZERO_REQUEST, 8, 8),
            (READ, 0, bytearray(1)),
        ]
        assert list(disk.submit_each(batch, stable=(0, 2))) == [1]
        assert flushes.count == 1
        assert list(disk.submit_each(batch)) == [1]
        assert flushes.count == 1
        assert list(disk.submit_each(batch, stable=(1, 3))) == [1]  # nothing of them was changed
        assert flushes.count == 1


def test_a_flush_that_fails_is_the_error_of_those_alone(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cowhand.open(raw, writable=True, format="raw") as disk:
        Flushes(disk.root, monkeypatch, disk, IOFailed("the medium is gone"))
        batch: list[Request] = [(WRITE_REQUEST, 0, b"a"), (WRITE_REQUEST, 1, b"b"), (DISCARD, 4096, 4096)]
        assert sorted(disk.submit_each(batch, stable=(1, 2))) == [1, 2]
        monkeypatch.undo()


def test_write_through_makes_all_stable(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cowhand.open(raw, writable=True, format="raw", cache="writethrough") as disk:
        flushes = Flushes(disk.root, monkeypatch, disk)
        assert disk.submit_each([(WRITE_REQUEST, 0, b"x"), (READ, 0, bytearray(1))]) == {}
        assert flushes.count == 1


def test_what_the_root_cannot_do_keeps_the_numbers_of_the_others(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cowhand.open(raw, writable=True, format="raw") as disk:
        node = disk.root
        node.capabilities = node.capabilities._replace(zeroes=Zeroing.NONE, discard=False)
        real = disk.edge.submit

        def submit(batch: Any) -> Any:
            assert all(kind in (READ, WRITE_REQUEST) for kind, _, _ in batch)
            real(batch)
            return {len(batch) - 1: IOFailed("the last one")}

        monkeypatch.setattr(disk.edge, "submit", submit)
        batch: list[Request] = [
            (DISCARD, 0, 512),
            (ZERO_REQUEST, 0, 1 << 19),
            (WRITE_REQUEST, SIZE, b"x"),
            (WRITE_REQUEST, 0, b"y"),
        ]
        assert sorted(disk.submit_each(batch)) == [2, 3]
        assert disk.read(0, 3) == b"y\0\0"
        monkeypatch.undo()

"""The null devices: what QEMU's documentation says of them, and qemu-img's view beside ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cowhand.block.disk import Disk
from cowhand.block.node.node import READ, WRITE_REQUEST
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols import null
from cowhand.block.protocols.null import NullAioNode, NullNode, NullOptions
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported
from cowhand.core.extents import ALLOCATED, DATA, OFFSET, ZERO
from cowhand.drivers import REGISTRY
from tests.tools.qemu import qemu_img, require_qemu


def open_null(**options: object) -> NullNode:
    return NullNode.open(None, NullOptions(**options), {})  # type: ignore[arg-type]


def test_the_default_size_is_a_gibibyte() -> None:
    assert open_null().size == 1 << 30


@pytest.mark.parametrize(("read_zeroes", "expected"), [(True, bytes(600)), (False, b"\xee" * 600)])
def test_reads_give_zeroes_or_leave_the_buffer(read_zeroes: bool, expected: bytes) -> None:
    node = open_null(read_zeroes=read_zeroes)
    buffer = bytearray(b"\xee" * 600)
    node.read_into(12345, buffer)
    assert buffer == expected
    buffer = bytearray(b"\xee" * 600)
    node.submit([(WRITE_REQUEST, 0, b"gone"), (READ, 0, buffer)])
    assert buffer == expected


def test_writes_vanish() -> None:
    with Disk(open_null(size=1 << 20, read_zeroes=True), writable=True) as disk:
        disk.write(4096, b"x" * 4096, fua=True)
        disk.write_zeroes(0, 1 << 20, unmap=True, fallback=False)
        disk.discard(0, 1 << 20)
        disk.flush()
        assert disk.read(4096, 4096) == bytes(4096)
        assert disk.root.allocated_size() == 0
        with pytest.raises(NotSupported):
            disk.root.resize(1 << 21)


@pytest.mark.parametrize(("read_zeroes", "flags"), [(True, ZERO | ALLOCATED | OFFSET), (False, OFFSET)])
def test_the_map_promises_zeroes_only_where_reads_give_them(read_zeroes: bool, flags: int) -> None:
    (row,) = open_null(size=1 << 60, read_zeroes=read_zeroes).map_batch(512, (1 << 60) - 512)
    assert (row.start, row.end, row.flags) == (512, 1 << 60, flags)
    assert not row.flags & DATA


def test_latency_is_waited_for_by_single_requests_and_once_by_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(null, "time", SimpleNamespace(sleep=waits.append))
    node = open_null(latency_ns=20_000_000)
    node.read_into(0, bytearray(1))
    assert waits == [0.02]
    node.submit([(WRITE_REQUEST, 0, b"x")] * 50)
    assert waits == [0.02, 0.02]


def test_options_and_names_that_mean_nothing_are_refused_in_qemus_words() -> None:
    with pytest.raises(InvalidArgument, match="latency-ns is invalid"):
        open_null(latency_ns=-5)
    with pytest.raises(InvalidArgument, match="out of range"):
        open_null(size=-1)
    for driver in (NullNode, NullAioNode):
        with pytest.raises(InvalidArgument) as caught:
            driver.parse_filename(f"{driver.driver}://x")
        assert caught.value.qemu() == f"The only allowed filename for this driver is '{driver.driver}://'"


@pytest.mark.parametrize("name", ["null-co", "null-aio"])
def test_names_open_it_and_it_prints_names_that_open_it(name: str) -> None:
    def described(filename: str) -> str | dict[str, str]:
        return filename if filename.startswith("json:") else {"driver": name, "filename": filename}

    for given in (f"{name}://", f'json:{{"driver": "{name}", "size": 65536, "read-zeroes": true}}'):
        node = Opening(REGISTRY).open(described(given))
        again = Opening(REGISTRY).open(described(node.filename))
        assert isinstance(node, NullNode)
        assert isinstance(again, NullNode)
        assert (again.size, again.options.read_zeroes) == (node.size, node.options.read_zeroes)
        assert given.startswith("json:") or node.filename == given
        for opened in (node, again):
            Disk(opened).close()


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("options", [{"size": 65536}, {"size": 1 << 20, "read_zeroes": True}])
def test_facts_equal_qemus(options: dict[str, int]) -> None:
    node = open_null(**options)
    text = ",".join(
        [
            "driver=null-co",
            *(f"{key.replace('_', '-')}={value}".replace("True", "on") for key, value in options.items()),
        ]
    )
    info = qemu_img("info", "--output=json", "--image-opts", text).json()
    assert (node.size, node.allocated_size()) == (info["virtual-size"], info["actual-size"])
    (row,) = node.map_batch(0, node.size)
    (told,) = qemu_img("map", "--output=json", "--image-opts", text).json()
    assert (bool(row.flags & DATA), bool(row.flags & ZERO), bool(row.flags & ALLOCATED)) == (
        told["data"],
        told["zero"],
        told["present"],
    )


def test_what_the_driver_does_not_know_is_refused() -> None:
    with pytest.raises(CowhandError, match="does not support the option 'foo'"):
        Opening(REGISTRY).open({"driver": "null-co", "foo": 1})

"""Reopening in place: all of a subtree or nothing, under running requests, and as long as nobody else is in the way."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.filters.throttle import groups as throttlegroups
from cowhand.block.filters.throttle.limits import Limits
from cowhand.block.filters.throttle.node import ThrottleNode
from cowhand.block.graph import graph
from cowhand.block.graph.reopen import reopen
from cowhand.block.node.node import Reopening, walk
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.file.node import FileNode
from cowhand.core.errors import CowhandError, ImageInUse, InvalidArgument, IOFailed, ReadOnly
from cowhand.drivers import REGISTRY
from cowhand.image.bitmaps import add_bitmap, list_bitmaps
from cowhand.image.create import create
from tests.block.disks import Worker
from tests.tools.qemu import assert_clean, require_qemu

MIB = 1 << 20
DIRTY = 1


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", 4 * MIB)
    return path


def state(disk: Disk) -> list[Any]:
    """Return all that a reopen changes, of the disk and every node below."""
    facts: list[Any] = [disk.read_only, disk.write_through, disk.edge.perm, disk.edge.shared, disk.size]
    for node in walk((disk.root,)):
        facts += [node.options, node.writable, node.limits, node.capabilities, node.lane_fd >= 0]
        facts += [(edge.perm, edge.shared) for edge in node.parents]
        if isinstance(node, FileNode):
            facts += [node.direct, os.get_blocking(node.fd)]
    return facts


def fail_once(call: Callable[..., Any]) -> Callable[..., Any]:
    left = [IOFailed("no")]

    def wrapped(*given: Any) -> Any:
        if left:
            raise left.pop()
        return call(*given)

    return wrapped


def incompatible(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[72:80], "big")


def file_of(disk: Disk) -> FileNode:
    return next(node for node in walk((disk.root,)) if isinstance(node, FileNode))


def test_a_disk_becomes_read_only_and_writable_again(image: Path) -> None:
    with cowhand.open(image, writable=True) as disk:
        disk.write(0, b"a" * 512)
        reopen(disk, writable=False)
        assert not any(node.writable for node in walk((disk.root,)))
        with cowhand.open(image) as other:  # complete on the medium, and not locked against readers
            assert other.read(0, 512) == b"a" * 512
        with pytest.raises(ReadOnly):
            disk.write(0, b"b")
        with pytest.raises(OSError):
            os.write(file_of(disk).fd, b"x")
        reopen(disk, writable=True)
        disk.write(512, b"b" * 512)
        assert disk.read(0, 1024) == b"a" * 512 + b"b" * 512
    assert_clean(image)


def test_lazy_counts_are_brought_in_order_before_an_image_is_read_only(image: Path) -> None:
    with cowhand.open(image, writable=True) as disk:
        reopen(disk, {"lazy-refcounts": True})
        disk.write(0, b"a" * 512)
        disk.flush()
        assert incompatible(image) & DIRTY
        reopen(disk, writable=False)
        assert not incompatible(image) & DIRTY
        assert_clean(image)
        reopen(disk, {"lazy-refcounts": "off"}, writable=True)
        disk.write(MIB, b"b" * 512)
        disk.flush()
        assert not incompatible(image) & DIRTY
    assert_clean(image)


def test_an_image_that_was_left_dirty_is_repaired_when_it_becomes_writable(image: Path) -> None:
    with cowhand.open(image, writable=True, options={"lazy-refcounts": True}) as disk:
        disk.write(0, b"a" * 512)
        disk.flush()
        crashed = image.with_name("crashed.qcow2")
        crashed.write_bytes(image.read_bytes())
    assert incompatible(crashed) & DIRTY
    with cowhand.open(crashed) as disk:
        assert disk.read(0, 512) == b"a" * 512
        reopen(disk, writable=True)
        assert not incompatible(crashed) & DIRTY
        disk.write(64 << 10, b"b" * 512)
        assert disk.read(0, 512) == b"a" * 512
    assert_clean(crashed)


def test_caching_changes_for_all_that_followed_it(tmp_path: Path, image: Path) -> None:
    top = tmp_path / "top.qcow2"
    create(str(top), "qcow2", None, backing=str(image), backing_format="qcow2")
    with cowhand.open(top, writable=True) as disk:
        disk.write(100, b"a" * 1000)
        reopen(disk, {"cache.direct": True}, write_through=True)
        files = [node for node in walk((disk.root,)) if isinstance(node, FileNode)]
        assert [(node.direct, node.limits.request_alignment > 1, node.lane_fd) for node in files] == [
            (True, True, -1), (True, True, -1),
        ]  # fmt: skip
        disk.write(900, b"b" * 1000)
        reopen(disk, {"file.cache.direct": False, "backing": {"cache": {"direct": "off"}}})
        assert not any(node.direct for node in files)
        assert disk.read(0, 2000) == bytes(100) + b"a" * 800 + b"b" * 1000 + bytes(100)
    assert_clean(top)


class _Refusing(Reopening):
    def activate(self) -> None:
        raise IOFailed("refused at the last moment")


class RefusingNode(FileNode):
    """A file that takes part in a reopen until the very end."""

    def prepare_reopen(self, options: Any, writable: bool) -> Reopening:
        inner = super().prepare_reopen(options, writable)
        inner.activate = _Refusing.activate.__get__(inner)  # type: ignore[method-assign]
        return inner


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"overlap-check": "nonsense"}, InvalidArgument),
        ({"file.filename": "other"}, InvalidArgument),
        ({"backing.lazy-refcounts": "perhaps"}, InvalidArgument),
        ({"driver": "raw"}, InvalidArgument),
        ({"file": "somebody"}, InvalidArgument),
        ({"detect-zeroes": "unmap"}, InvalidArgument),
        ({"cache.direct": True, "l2-cache-size": "1M", "cache-size": "64k"}, InvalidArgument),
    ],
)
def test_a_refused_reopen_changes_nothing(
    tmp_path: Path, image: Path, options: dict[str, Any], error: type[CowhandError], writable: bool
) -> None:
    top = tmp_path / "top.qcow2"
    create(str(top), "qcow2", None, backing=str(image), backing_format="qcow2")
    with cowhand.open(top, writable=writable) as disk:
        if writable:
            disk.write(0, b"a" * 512)
        before = state(disk)
        with pytest.raises(error):
            reopen(disk, options, writable=not writable)
        assert state(disk) == before
        if writable:
            disk.write(512, b"b" * 512)
            assert disk.read(0, 1024) == b"a" * 512 + b"b" * 512
    assert_clean(top)


def test_a_reopen_that_fails_at_its_end_is_undone(image: Path) -> None:
    file = RefusingNode.open(None, RefusingNode.options_class(filename=str(image), read_only=False), {})
    root = Opening(REGISTRY).open({"driver": "qcow2", "file": file, "read-only": False})
    with Disk(root, writable=True) as disk:
        disk.write(0, b"a" * 512)
        before = state(disk)
        with pytest.raises(IOFailed, match="last moment"):
            reopen(disk, {"cache.direct": True})
        with pytest.raises(IOFailed, match="last moment"):
            reopen(disk, writable=False)
        assert state(disk) == before
        disk.write(70000, b"b" * 512)
        assert disk.read(0, 512) == b"a" * 512
    assert_clean(image)


def test_the_path_may_not_have_become_another_file(image: Path) -> None:
    with cowhand.open(image, writable=True) as disk:
        disk.write(0, b"a" * 512)
        os.rename(image, image.with_name("moved"))
        create(str(image), "qcow2", MIB)
        before = state(disk)
        with pytest.raises(IOFailed, match="replaced by another one"):
            reopen(disk, writable=False)
        assert state(disk) == before
        disk.write(512, b"b" * 512)
    assert_clean(image.with_name("moved"))


def test_a_file_without_a_name_can_be_reopened(image: Path) -> None:
    with cowhand.open(image, writable=True) as disk:
        disk.write(0, b"a" * 512)
        image.unlink()
        reopen(disk, writable=False)
        reopen(disk, writable=True)
        disk.write(512, b"b" * 512)
        assert disk.read(0, 1024) == b"a" * 512 + b"b" * 512


def test_somebody_who_writes_keeps_a_node_from_becoming_read_only(image: Path) -> None:
    with cowhand.open(image, writable=True) as disk, Disk(disk.root, writable=True) as other:
        before = state(disk)
        with pytest.raises(ReadOnly, match="cannot support read-write users"):
            reopen(disk, writable=False)
        assert state(disk) == before
        other.write(0, b"a" * 512)
    with cowhand.open(image, writable=True) as disk:
        with pytest.raises(ReadOnly, match="cannot support read-write users"):
            reopen(disk, {"file.read-only": True})
        with pytest.raises(ReadOnly):
            reopen(disk, {"read-only": True})  # without the word that the disk shall follow
        disk.write(0, b"a" * 512)


def test_another_process_keeps_an_image_from_becoming_writable(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    with cowhand.open(path, format="raw") as disk, cowhand.open(path, format="raw") as reader:
        graph.set_permissions(reader.edge, reader.edge.perm, 0x05)  # no writers beside this one
        before = state(disk)
        with pytest.raises(ImageInUse):
            reopen(disk, writable=True)
        assert state(disk) == before
        graph.set_permissions(reader.edge, reader.edge.perm, 0x0F)
        reopen(disk, writable=True)
        disk.write(0, b"a" * 512)
    assert path.read_bytes()[:512] == b"a" * 512


def test_writers_do_not_notice(image: Path) -> None:
    with cowhand.open(image, writable=True) as disk:
        written: list[dict[int, int]] = [{} for _ in range(4)]
        stop = False

        def work(lane: int) -> None:
            chance = random.Random(lane)
            while not stop:
                block = chance.randrange(256) * 4 + lane
                disk.write(block * 4096, bytes([chance.randrange(1, 256)]) * 4096)
                written[lane][block] = disk.read(block * 4096, 1)[0]

        workers = [Worker(work, lane) for lane in range(4)]
        for number in range(12):
            reopen(disk, {"cache.direct": number % 2 == 0, "lazy-refcounts": number % 3 == 0})
        stop = True
        for worker in workers:
            worker.done()
        for lane in written:
            for block, byte in lane.items():
                assert disk.read(block * 4096, 4096) == bytes([byte]) * 4096
    assert_clean(image)


def test_a_node_changes_its_throttle_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    groups = [throttlegroups.define(f"reopen-{number}", Limits.parse({})) for number in range(2)]
    root = Opening(REGISTRY).open(
        {"driver": "throttle", "throttle-group": "reopen-0", "read-only": False,
         "file": {"driver": "file", "filename": str(path)}}
    )  # fmt: skip
    with Disk(root, writable=True) as disk:
        node = disk.root
        assert isinstance(node, ThrottleNode)
        with pytest.raises(InvalidArgument, match="does not exist"):
            reopen(disk, {"throttle-group": "nobody"})
        assert [len(group.members) for group in groups] == [1, 0]
        monkeypatch.setattr(graph, "refresh", fail_once(graph.refresh))
        with pytest.raises(IOFailed):
            reopen(disk, {"throttle-group": "reopen-1"})
        assert [len(group.members) for group in groups] == [1, 0]
        assert node.member is not None
        assert node.member.hurried == 0, "its limits would never count again"
        reopen(disk, {"throttle-group": "reopen-1"})
        assert [len(group.members) for group in groups] == [0, 1]
        disk.write(0, b"x" * 512)
    assert [len(group.members) for group in groups] == [0, 0]


@require_qemu
def test_bitmaps_follow_through_a_reopen(image: Path) -> None:
    with cowhand.open(image, writable=True) as disk:
        add_bitmap(disk, "changes", granularity=65536)
        disk.write(0, b"a" * 512)
        reopen(disk, writable=False)
        reopen(disk, writable=True)
        disk.write(3 * MIB, b"b" * 512)
        reopen(disk, {"lazy-refcounts": True})
        disk.write(2 * MIB, b"c" * 512)
    assert_clean(image)
    with cowhand.open(image) as disk:
        (bitmap,) = list_bitmaps(disk)
        assert [bitmap.bits.is_dirty(offset) for offset in (0, MIB, 2 * MIB, 3 * MIB)] == [True, False, True, True]


def test_the_way_around_a_raw_image_ends_where_it_gets_a_window(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    with cowhand.open(path, writable=True, format="raw") as disk:
        assert disk.root.lane_fd >= 0
        reopen(disk, {"offset": "512k", "size": 4096})
        assert (disk.size, disk.root.lane_fd) == (4096, -1)
        disk.write(0, b"a" * 512)
        with pytest.raises(InvalidArgument):
            reopen(disk, {"offset": "2M"})
        assert disk.size == 4096
        reopen(disk, {"offset": 0, "size": MIB})
        assert disk.root.lane_fd >= 0
        assert disk.read(512 << 10, 512) == b"a" * 512
    with cowhand.open(path, writable=True) as disk:  # a guess: its first sector is guarded
        reopen(disk, {"cache.direct": True})
        reopen(disk, {"cache.direct": False})
        assert disk.root.lane_fd == -1


def test_a_disk_that_may_not_resize_does_not_get_to_by_a_reopen(image: Path) -> None:
    with cowhand.open(image, writable=True, resizable=False) as disk:
        before = disk.edge.perm
        reopen(disk, writable=False)
        reopen(disk, writable=True)
        assert disk.edge.perm == before


def test_a_disk_that_only_reads_a_writable_node_does_not_get_to_write(image: Path) -> None:
    with cowhand.open(image, writable=True) as disk, Disk(disk.root) as reader:
        reopen(reader, {"lazy-refcounts": True})
        assert reader.read_only
        with pytest.raises(ReadOnly):
            reader.write(0, b"x")


def test_users_of_a_backing_file_are_held_back_too(tmp_path: Path, image: Path) -> None:
    top = tmp_path / "top.qcow2"
    create(str(top), "qcow2", None, backing=str(image), backing_format="qcow2")
    with cowhand.open(top, writable=True) as disk:
        backing = disk.root.backing
        assert backing is not None
        stop = False
        with Disk(backing.node) as below:

            def read() -> None:
                while not stop:
                    assert below.read(100, 1000) == bytes(1000)

            workers = [Worker(read) for _ in range(2)]
            for number in range(10):
                reopen(disk, {"cache.direct": number % 2 == 0})
            stop = True
            for worker in workers:
                worker.done()

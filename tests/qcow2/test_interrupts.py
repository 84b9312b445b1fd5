"""What is not an error of ours, a signal or want of memory above all, in the middle of a change of metadata: nothing is written after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cowhand.block.disk import Disk
from cowhand.block.format_io.table_cache import TableCache
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.formats.qcow2.resize import preallocate_run
from cowhand.core.errors import CowhandError, Poisoned
from tests.qcow2 import images, oracle
from tests.qcow2.images import Shape

SHAPE = Shape(cluster=4096, size=16 * 4096)


class _Scene:
    def __init__(self) -> None:
        self.file = images.Medium(content=images.create(SHAPE, b"\1" * 8192).snapshot_bytes())
        self.keeper = Disk(self.file)
        self.disk = images.open_over(self.file, writable=True)
        assert isinstance(self.disk.root, Qcow2Node)
        self.node = self.disk.root

    def nothing_more_is_written(self) -> None:
        stored = self.file.snapshot_bytes()
        with pytest.raises(Poisoned):
            self.disk.write(0, b"\2" * 4096)
        with pytest.raises(CowhandError):
            self.disk.close()
        assert self.file.snapshot_bytes() == stored
        assert oracle.Image(stored).check().corruptions == []


@pytest.fixture
def scene() -> Iterator[_Scene]:
    made = _Scene()
    yield made
    made.keeper.close()


def test_a_run_of_clusters_that_was_linked_is_not_given_back(scene: _Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    link = preallocate_run._link

    def link_then_stop(*args: int, **kwargs: int) -> int:
        link(*args, **kwargs)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(preallocate_run, "_link", link_then_stop)
    with pytest.raises(KeyboardInterrupt):
        scene.disk.resize(2 * SHAPE.size, preallocation="falloc")
    scene.nothing_more_is_written()


def test_an_interrupt_while_tables_are_held(scene: _Scene) -> None:
    scene.disk.write(0, b"\3" * 4096)
    with pytest.raises(KeyboardInterrupt), scene.node.exclusive():
        raise KeyboardInterrupt
    scene.nothing_more_is_written()


def test_changes_that_were_taken_for_a_write_back_and_lost(scene: _Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a write has to wait for the write-back, and not only where the user flushes."""
    collect = TableCache.collect

    def collect_then_fail(cache: TableCache, *, held: bool = False) -> None:
        collect(cache, held=held)
        raise MemoryError

    scene.disk.write(32768, b"\3" * 4096)
    monkeypatch.setattr(TableCache, "collect", collect_then_fail)
    with pytest.raises(MemoryError):
        scene.node.write_back.flush()
    monkeypatch.undo()
    scene.nothing_more_is_written()


def test_a_disk_whose_closing_was_interrupted_can_be_closed(scene: _Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.disk.write(32768, b"\3" * 4096)

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scene.node, "flush", stop)
    with pytest.raises(KeyboardInterrupt):
        scene.disk.close()
    monkeypatch.undo()
    assert not scene.disk.closed
    scene.disk.close()
    assert oracle.Image(scene.file.snapshot_bytes()).content()[32768 : 32768 + 4096] == b"\3" * 4096

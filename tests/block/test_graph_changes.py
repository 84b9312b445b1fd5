"""Changes of a live graph: filters come and go, and nodes are replaced, at every depth, under writers and a running copy."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.graph.blockers import Blocker, check_blockers
from cowhand.block.graph.changes import GraphChange, drop_filter, insert_filter, replace_node, users_of
from cowhand.block.graph.names import NodeNames
from cowhand.block.graph.users import DiskListener
from cowhand.block.node.node import ALL_PERMISSIONS, RESIZE, WRITE, BlockNode, Role, walk
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.copy.engine.engine import Engine
from cowhand.copy.engine.plan import Policy
from cowhand.copy.engine.sink import LaneSink, choose
from cowhand.copy.engine.source import Source
from cowhand.core.errors import Closed, CowhandError, InvalidArgument, NodeBusy, PermissionConflict
from cowhand.drivers import REGISTRY
from cowhand.image.create import create
from cowhand.image.open import open_image
from cowhand.testing.wrapper import WrapperNode
from tests.block.disks import Worker, qcow2_disk, qcow2_file, qcow2_node
from tests.tools.patience import PATIENCE

KIB, MIB = 1 << 10, 1 << 20
WRITERS = 8
SLICE = 256 * KIB
#: Changes of the graph in one test.
ROUNDS = int(os.environ.get("COWHAND_GRAPH_ROUNDS", "60"))


def copy_on_read(node: BlockNode) -> BlockNode:
    return Opening(REGISTRY).open({"driver": "copy-on-read", "file": node, "read-only": not node.writable})


def raw(node: BlockNode) -> BlockNode:
    return Opening(REGISTRY).open({"driver": "raw", "file": node, "read-only": not node.writable})


class Writers:
    """Threads that write, read back, zero and discard, each in its own slice of a disk, until they are stopped."""

    def __init__(self, disk: Disk, seed: int) -> None:
        self.disk = disk
        self.stopped = threading.Event()
        self.models = [bytearray(disk.read(number * SLICE, SLICE)) for number in range(WRITERS)]
        self.workers = [Worker(self._work, number, seed * WRITERS + number) for number in range(WRITERS)]

    def _work(self, number: int, seed: int) -> None:
        rng, model, base = random.Random(seed), self.models[number], number * SLICE
        while not self.stopped.is_set():
            offset = rng.randrange(SLICE)
            length = min(SLICE - offset, rng.choice((1, 512, 4096, 70_000)))
            kind = rng.randrange(8)
            if kind < 4:
                data = rng.randbytes(length)
                self.disk.write(base + offset, data)
                model[offset : offset + length] = data
            elif kind == 4:
                self.disk.write_zeroes(base + offset, length, unmap=bool(length % 2))
                model[offset : offset + length] = bytes(length)
            elif kind == 5:
                self.disk.flush()
            else:
                assert self.disk.read(base + offset, length) == model[offset : offset + length]

    def stop(self) -> None:
        self.stopped.set()
        for worker in self.workers:
            worker.done()
        for number, model in enumerate(self.models):
            assert self.disk.read(number * SLICE, SLICE) == model, f"slice {number}"


def change_somewhere(root: BlockNode, rng: random.Random, inserted: list[BlockNode]) -> None:
    """Insert a filter over a random node, take one out, or put one in another's place."""
    inserted[:] = [node for node in inserted if not node.closed]
    if inserted and rng.random() < 0.5:
        filter = inserted.pop(rng.randrange(len(inserted)))
        if rng.random() < 0.3:
            below = filter.children["file"].node
            other = WrapperNode(below)
            replace_node(filter, other)
            inserted.append(other)
        else:
            drop_filter(filter)
        return
    node = rng.choice(walk((root,)))
    make: Callable[[BlockNode], BlockNode] = (
        rng.choice((WrapperNode, raw, copy_on_read)) if node.is_format else WrapperNode
    )
    if make is copy_on_read and any(edge.is_child for edge in node.parents):
        make = WrapperNode
    filter = make(node)
    insert_filter(filter, node)
    inserted.append(filter)


def files(folder: Path) -> Path:
    """Make a chain of two images with data in both, and return the upper one."""
    create(folder / "base.qcow2", "qcow2", WRITERS * SLICE)
    with open_image(folder / "base.qcow2", writable=True) as disk:
        for offset in range(0, WRITERS * SLICE - 64 * KIB, 96 * KIB):
            disk.write(offset, bytes([offset // 4096 % 255 + 1]) * 50_000)
    create(folder / "top.qcow2", "qcow2", backing=str(folder / "base.qcow2"), backing_format="qcow2")
    return folder / "top.qcow2"


def test_filters_come_and_go_at_every_depth_under_writers(image_dir: Path, rng: random.Random) -> None:
    with open_image(files(image_dir), writable=True) as disk:
        writers = Writers(disk, rng.randrange(1 << 20))
        inserted: list[BlockNode] = []
        for _ in range(ROUNDS):
            change_somewhere(disk.root, rng, inserted)
        writers.stop()
        assert not [node for node in walk((disk.root,)) if node.closed]
    with open_image(image_dir / "top.qcow2") as again:
        for number, model in enumerate(writers.models):
            assert again.read(number * SLICE, SLICE) == model


def test_a_running_copy_follows_what_is_put_over_its_target(image_dir: Path, rng: random.Random) -> None:
    content = rng.randbytes(24 * MIB)
    source = Disk(MemoryNode(content=content), name="source")
    create(image_dir / "target.qcow2", "qcow2", len(content))
    seen: list[str] = []

    class Counting(WrapperNode):
        def write(self, offset: int, buffers: Any, fua: bool = False) -> None:
            seen.append("write")
            super().write(offset, buffers, fua)

    with open_image(image_dir / "target.qcow2", writable=True) as target:
        sink = choose(target, sparse=4096, reads_zero=True)
        assert isinstance(sink, LaneSink)
        assert sink.direct
        read = Source([source])
        engine = Engine(read, sink, workers=2)
        copying = Worker(engine.run, read.runs(Policy(unit=sink.unit)))
        inserted: list[BlockNode] = []
        while copying.is_alive():
            if inserted and rng.random() < 0.4:
                drop_filter(inserted.pop())
            else:
                node = target.root if rng.random() < 0.6 else walk((target.root,))[-1]
                inserted.append(Counting(node))
                insert_filter(inserted[-1], node)
        copying.done()
        for offset in range(0, len(content), MIB):
            assert target.read(offset, MIB) == content[offset : offset + MIB]
    source.close()


def test_the_direct_path_ends_while_a_filter_stands_over_the_target(image_dir: Path) -> None:
    create(image_dir / "t.qcow2", "qcow2", MIB)
    with open_image(image_dir / "t.qcow2", writable=True) as disk:
        sink = choose(disk, sparse=0, reads_zero=True)
        assert isinstance(sink, LaneSink)
        filter = WrapperNode(disk.root)
        insert_filter(filter, disk.root)
        assert not sink.direct
        drop_filter(filter)
        assert filter.closed
        assert sink.direct


class TestTogether:
    """One change is made whole, or not at all."""

    def test_a_refused_change_leaves_everything_as_it_was(self) -> None:
        lower, other = MemoryNode(content=bytes(MIB)), MemoryNode(content=b"o" * MIB)
        disk, second = Disk(raw(lower), writable=True), Disk(lower)
        keeper = Disk(other, writable=True, shared=ALL_PERMISSIONS & ~WRITE)
        root = disk.root
        before = [
            (edge, edge.node, edge.perm, edge.shared)
            for edge in (disk.edge, second.edge, keeper.edge, root.children["file"])
        ]
        change = GraphChange()
        change.move(second.edge, other)
        change.move(root.children["file"], other)  # a second writer, which is not shared
        with pytest.raises(PermissionConflict), graph.quiesce(lower, other):
            change.commit()
        assert [(edge, edge.node, edge.perm, edge.shared) for edge, *_ in before] == before
        assert root.children["file"] in lower.parents
        disk.write(0, b"still")
        assert second.read(0, 5) == b"still"
        for each in (disk, second, keeper):
            each.close()

    def test_no_node_can_come_to_stand_on_itself(self) -> None:
        disk = qcow2_disk(MIB, backing=qcow2_node(qcow2_file(MIB)))
        base = disk.root.children["backing"].node
        change = GraphChange()
        change.attach(base, "backing", disk.root, Role.BACKING)
        with graph.quiesce(base), pytest.raises(InvalidArgument, match="would create a cycle"):
            change.commit()
        assert "backing" not in base.children
        disk.close()

    def test_two_disks_change_their_roots_at_one_moment(self) -> None:
        disks = [Disk(MemoryNode(content=bytes([number]) * MIB)) for number in (1, 2)]
        one, two = (disk.root for disk in disks)
        with graph.quiesce(one, two):
            change = GraphChange()
            change.move(disks[0].edge, two)
            change.move(disks[1].edge, one)
            change.commit()
        assert [disk.read(0, 1) for disk in disks] == [b"\2", b"\1"]
        for disk in disks:
            disk.close()

    def test_an_overlay_comes_between_and_the_backing_file_goes(self) -> None:
        base = qcow2_node(qcow2_file(MIB))
        disk = Disk(base, writable=True)
        disk.write(0, b"below")
        overlay = qcow2_node(qcow2_file(MIB))
        with graph.quiesce(base, overlay):
            disk.flush()
            change = GraphChange()
            change.move(disk.edge, overlay)
            change.attach(overlay, "backing", base, Role.BACKING)
            change.commit()
        disk.write(3, b"__")
        assert disk.read(0, 8) == b"bel__\0\0\0"
        assert base.children["file"].node.parents
        with graph.quiesce(overlay):
            change = GraphChange()
            change.detach(overlay.children["backing"])
            change.commit()
        assert base.closed
        disk.close()


def test_a_node_that_is_closed_is_not_attached_to(image_dir: Path) -> None:
    create(image_dir / "t.qcow2", "qcow2", MIB)
    disk = open_image(image_dir / "t.qcow2")
    node = disk.root
    disk.close()
    with pytest.raises(Closed):
        Disk(node)


class TestDrainsOfSeveralDisks:
    def test_a_thread_inside_one_of_them_may_use_the_other(self) -> None:
        # A mirror's piece: a lease on the source, a write to the target. The drain shuts one gate after the other.
        one, two = (Disk(MemoryNode(content=bytes(MIB)), writable=True) for _ in range(2))
        leased, shut = threading.Event(), threading.Event()

        def piece() -> None:
            with two.lease():
                leased.set()
                assert shut.wait(PATIENCE)
                one.write(0, b"x")
                two.write(0, b"y")
                one.flush()

        def drain() -> None:
            with graph.quiesce(one.root, two.root, deadline=20):
                assert not one.in_flight
                assert not two.in_flight

        worker = Worker(piece)
        assert leased.wait(PATIENCE)
        drainer = Worker(drain)
        while not (one.gate.closed and two.gate.closed):
            pass
        shut.set()
        worker.done()
        drainer.done()
        assert (one.read(0, 1), two.read(0, 1)) == (b"x", b"y")
        for disk in (one, two):
            disk.close()

    def test_another_threads_requests_stay_out(self) -> None:
        one, two = (Disk(MemoryNode(content=bytes(MIB)), writable=True) for _ in range(2))
        with graph.quiesce(one.root, two.root):
            stranger = Worker(one.write, 0, b"x")
            stranger.join(0.1)
            assert stranger.is_alive()
            assert two.read(0, 1) == b"\0"
        stranger.done()
        for disk in (one, two):
            disk.close()


class TestNames:
    def open(self, names: NodeNames, description: dict[str, Any]) -> BlockNode:
        return Opening(REGISTRY, names=names).open(description)

    def test_children_are_named_and_owners_keep_nodes_open(self) -> None:
        names = NodeNames()
        file = self.open(names, {"driver": "memory", "size": MIB, "node-name": "store"})
        names.own(file)
        root = self.open(names, {"driver": "raw", "file": "store", "node-name": "disk"})
        assert root.children["file"].node is file
        assert names.get("disk") is root
        with pytest.raises(InvalidArgument, match="Block device store is in use"):
            names.disown(file)
        Disk(root).close()
        assert "disk" not in names
        assert not file.closed
        names.disown(file)
        assert file.closed
        assert "store" not in names

    def test_a_name_means_one_node(self) -> None:
        names = NodeNames()
        node = self.open(names, {"driver": "memory", "size": 512, "node-name": "n"})
        names.own(node)
        with pytest.raises(InvalidArgument, match="Duplicate nodes with node-name='n'"):
            self.open(names, {"driver": "memory", "size": 512, "node-name": "n"})
        with pytest.raises(InvalidArgument, match="nor node-name='nothing'"):
            self.open(names, {"driver": "raw", "file": "nothing"})
        names.disown(node)
        self.open(names, {"driver": "memory", "size": 512, "node-name": "n"}).close()

    def test_what_is_used_is_not_let_go(self) -> None:
        names = NodeNames()
        node = self.open(names, {"driver": "memory", "size": 512, "node-name": "n"})
        with pytest.raises(InvalidArgument, match="is not owned by the monitor"):
            names.disown(node)
        names.own(node)
        disk = Disk(node)
        with pytest.raises(InvalidArgument, match="Block device n is in use"):
            names.disown(node)
        disk.close()
        assert not node.closed
        names.disown(node)

    def test_owners_do_not_move_with_the_users(self) -> None:
        names = NodeNames()
        node = self.open(names, {"driver": "memory", "size": MIB, "node-name": "n"})
        names.own(node)
        disk = Disk(node)
        filter = WrapperNode(node)
        insert_filter(filter, node)
        assert disk.root is filter
        assert names.owns(node)
        assert users_of(node) == [filter.below]
        disk.close()
        assert not node.closed
        names.disown(node)


def test_blockers_refuse_in_qemus_words() -> None:
    node = MemoryNode(content=bytes(512))
    node.name = "d0"
    blocker = Blocker("block device is in use by block job: backup")
    blocker.block(node, "resize")
    check_blockers(node, "resize")
    with pytest.raises(NodeBusy, match="Node 'd0' is busy: block device is in use by block job: backup"):
        check_blockers(node, "mirror-source")
    blocker.release()
    check_blockers(node, "mirror-source")


class Heard(DiskListener):
    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def resized(self, disk: Any, size: int) -> None:
        self.events.append(("resized", size))

    def replaced(self, disk: Any, root: BlockNode) -> None:
        self.events.append(("replaced", root))

    def failed(self, disk: Any, error: CowhandError) -> None:
        self.events.append(("failed", error))

    def closed(self, disk: Any) -> None:
        self.events.append(("closed", disk))


def test_listeners_hear_of_sizes_roots_failures_and_the_end() -> None:
    disk, heard = qcow2_disk(MIB), Heard()
    disk.listen(heard)
    disk.resize(2 * MIB)
    root: Any = disk.root
    filter = WrapperNode(root)
    insert_filter(filter, root)
    error = CowhandError("the medium is gone")
    root.set_poison(error)
    with pytest.raises(CowhandError):
        disk.write(0, b"x")
    drop = pytest.raises(CowhandError)
    with drop:
        disk.close()
    assert heard.events == [("resized", 2 * MIB), ("replaced", filter), ("failed", error), ("closed", disk)]


def test_sharing_is_asked_of_the_disk() -> None:
    node = MemoryNode(content=bytes(512))
    reader = Disk(node)
    reader.share(ALL_PERMISSIONS & ~(WRITE | RESIZE))
    with pytest.raises(PermissionConflict):
        Disk(node, writable=True)
    reader.share(ALL_PERMISSIONS)
    Disk(node, writable=True).close()
    reader.close()

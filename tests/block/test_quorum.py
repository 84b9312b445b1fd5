"""Quorum and blkverify: votes beside a count made here, what is repaired, what ends everything."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from cowhand.block.disk import Disk
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import PAGE, MemoryNode, MemoryOptions
from cowhand.core.errors import CowhandError, InvalidArgument, IOFailed, VerificationFailed
from cowhand.core.extents import ZERO, ExtentBatch
from cowhand.drivers import REGISTRY
from cowhand.testing.faults import FaultNode
from cowhand.testing.filters import FilterContract
from cowhand.testing.nodes import NodeContract


def quorum(nodes: list[BlockNode], threshold: int = 2, **options: Any) -> Any:
    given = {"driver": "quorum", "vote-threshold": threshold, "children": nodes, "read-only": not nodes[0].writable}
    return Opening(REGISTRY).open({**given, **{name.replace("_", "-"): value for name, value in options.items()}})


def blkverify(raw: BlockNode, test: BlockNode) -> Any:
    return Opening(REGISTRY).open({"driver": "blkverify", "raw": raw, "test": test, "read-only": not raw.writable})


class TestQuorumContract(NodeContract):
    """Copies that agree are one disk."""

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        return quorum([MemoryNode(MemoryOptions(read_only=not writable), content) for _ in range(3)])  # type: ignore[no-any-return]

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        contents = {child.node.snapshot_bytes() for child in node.children.values()}  # type: ignore[attr-defined]
        assert len(contents) == 1
        return contents.pop()


class TestBlkVerifyContract(FilterContract):
    """So are two that are the same."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        twin = MemoryNode(
            MemoryOptions(read_only=not inner.writable, request_alignment=inner.limits.request_alignment),
            self.content(),
        )
        return blkverify(inner, _Follower(twin, inner))  # type: ignore[no-any-return]


class _Follower(FaultNode):
    """Fails when the other one does: the contract wants the error, not the difference."""

    def __init__(self, inner: BlockNode, leader: BlockNode) -> None:
        super().__init__(inner)
        self._leader = leader
        if isinstance(leader, FaultNode):
            self._rules = leader._rules


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(st.sampled_from((b"a", b"b", b"c", None)), min_size=1, max_size=6), threshold=st.integers(1, 6)
)
def test_votes(contents: list[bytes | None], threshold: int) -> None:
    """None is a child that cannot be read."""
    if threshold > len(contents):
        threshold = len(contents)
    nodes: list[BlockNode] = []
    for byte in contents:
        faults = FaultNode(MemoryNode(content=(byte or b"x") * 512))
        if byte is None:
            faults.fail("read", lasting=True)
        nodes.append(faults)
    said = [byte for byte in contents if byte is not None]
    best = max(said, key=said.count) if said else None
    with Disk(quorum(nodes, threshold)) as disk:
        if len(said) >= threshold and best is not None and said.count(best) >= threshold:
            found = disk.read(0, 512)
            assert said.count(found[:1]) == said.count(best)
            assert found == found[:1] * 512
        else:
            with pytest.raises(IOFailed):
                disk.read(0, 512)


@pytest.mark.parametrize("rewrite", [False, True])
def test_what_differs_is_told_and_rewritten_if_asked(rewrite: bool) -> None:
    nodes = [MemoryNode(content=bytes([n]) * 1024) for n in (7, 7, 9)]
    told: list[tuple[str, Any]] = []
    with Disk(quorum(list(nodes), rewrite_corrupted=rewrite), writable=True) as disk:
        disk.root.listener = lambda what, facts: told.append((what, facts["node"]))  # type: ignore[attr-defined]
        assert disk.read(512, 512) == b"\7" * 512
        assert told == [("report-bad", nodes[2].name)]
        assert nodes[2].snapshot_bytes() == b"\t" * 512 + (b"\7" if rewrite else b"\t") * 512


def test_writes_need_as_many_children_as_reads() -> None:
    faults = [FaultNode(MemoryNode(content=bytes(512))) for _ in range(3)]
    with Disk(quorum(list(faults)), writable=True) as disk:
        faults[0].fail("write", lasting=True)
        disk.write(0, b"x" * 512)
        assert disk.read(0, 512) == b"x" * 512  # two against one
        faults[1].fail("write", lasting=True)
        with pytest.raises(IOFailed):
            disk.write(0, b"y" * 512)


def test_fifo_takes_the_first_that_answers() -> None:
    faults = [FaultNode(MemoryNode(content=bytes([n]) * 512)) for n in (1, 2)]
    with Disk(quorum(list(faults), 1, read_pattern="fifo")) as disk:
        assert disk.read(0, 512) == b"\1" * 512
        faults[0].fail("read", lasting=True)
        assert disk.read(0, 512) == b"\2" * 512


def test_fragmented_children_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    present = [{page for page in range(2048) if rng.random() < 0.4} for _ in range(3)]
    nodes = [MemoryNode(MemoryOptions(size=2048 * PAGE)) for _ in present]
    for node, pages in zip(nodes, present, strict=True):
        for page in pages:
            node.write(page * PAGE, (b"d" * PAGE,))
    with Disk(quorum(list(nodes), 1)) as disk:
        asked = 0
        answer = MemoryNode.map_batch

        def noted(node: MemoryNode, offset: int, length: int) -> ExtentBatch:
            nonlocal asked
            asked += 1
            return answer(node, offset, length)

        monkeypatch.setattr(MemoryNode, "map_batch", noted)
        rows = [row for batch in disk.extents() for row in batch]
    assert asked == 3
    data = {page for row in rows if not row.flags & ZERO for page in range(row.start // PAGE, row.end // PAGE)}
    assert data == set.union(*present)


def test_zeroes_are_where_all_have_some() -> None:
    nodes = [MemoryNode(), MemoryNode()]
    for number, node in enumerate(nodes):
        node.resize(1 << 20)
        node.write(number << 18, (b"d" * 65536,))
    with Disk(quorum(list(nodes), 1)) as disk:
        rows = [(row.start, bool(row.flags & ZERO)) for batch in disk.extents() for row in batch]
        assert {start: zero for start, zero in rows if start in (0, 1 << 18, 1 << 19)}.get(0) is False
        for start, zero in rows:
            assert not (zero and start in (0, 1 << 18))


@pytest.mark.parametrize(
    ("count", "options"),
    [(2, {"threshold": 3}), (2, {"threshold": 0}), (3, {"blkverify": True}), (2, {"read_pattern": "first"}),
     (2, {"blkverify": True, "rewrite_corrupted": True})],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(count: int, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        quorum([MemoryNode(content=bytes(512)) for _ in range(count)], **options)


def test_children_must_be_of_one_size() -> None:
    with pytest.raises(IOFailed, match="differ in size"):
        quorum([MemoryNode(content=bytes(512)), MemoryNode(content=bytes(1024))])


@pytest.mark.parametrize("driver", ["quorum", "blkverify"])
def test_a_difference_ends_everything(driver: str) -> None:
    good, bad = MemoryNode(content=bytes(1024)), MemoryNode(content=bytes(700) + b"!" + bytes(323))
    node = blkverify(good, bad) if driver == "blkverify" else quorum([good, bad], blkverify=True)
    disk = Disk(node, writable=True)
    assert disk.read(0, 512) == bytes(512)
    with pytest.raises(VerificationFailed, match="contents mismatch at offset 700"):
        disk.read(512, 512)
    with pytest.raises(VerificationFailed):
        disk.write(0, b"x")
    assert bad.snapshot_bytes()[:1] == b"\0"
    with pytest.raises(CowhandError):
        disk.close()


def test_an_error_on_one_side_is_a_difference() -> None:
    faults = FaultNode(MemoryNode(content=bytes(512)))
    disk = Disk(blkverify(MemoryNode(content=bytes(512)), faults), writable=True)
    faults.fail("write", lasting=True)
    with pytest.raises(VerificationFailed, match="return value mismatch -5 != 0"):
        disk.write(0, b"x" * 512)
    with pytest.raises(CowhandError):
        disk.close()


def test_the_same_file_may_be_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4096)
    file = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    wanted = {"driver": "quorum", "vote-threshold": 2, "children": [file, file], "read-only": True}
    with Disk(Opening(REGISTRY).open(wanted)) as disk:
        assert disk.read(0, 2) == b"xx"

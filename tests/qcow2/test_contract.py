"""qcow2 keeps to the contract of formats, at its extremes of version, cluster size and reference count width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.drivers import REGISTRY
from cowhand.image.create import create
from cowhand.testing.formats import FormatContract
from tests.qcow2 import oracle


class Qcow2Contract(FormatContract):
    """An image in a file; the tests' own reader reads and checks it."""

    options: dict[str, str] = {}
    data = ""  #: the name of the data file

    def _create(self, folder: Path, size: int) -> None:
        options = {**self.options, "data_file": str(folder / self.data)} if self.data else self.options
        create(folder / "disk.qcow2", "qcow2", size, options)

    def _image(self, folder: Path) -> oracle.Image:
        external = [(folder / self.data).read_bytes()] if self.data else []
        return oracle.Image((folder / "disk.qcow2").read_bytes(), b"", *external)

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        self._create(folder, len(content))
        node = self.open_again(folder)
        with Disk(node, writable=True) as disk:
            disk.write(0, content)
        return self.open_again(folder, writable)

    def make_overlay(self, folder: Path, backing: BlockNode, size: int) -> BlockNode:
        self._create(folder, size)
        self.backing = bytearray(backing.size)
        backing.read_into(0, self.backing)
        return self.open_again(folder, backing=backing)

    def open_again(self, folder: Path, writable: bool = True, backing: BlockNode | None = None) -> BlockNode:
        description: dict[str, Any] = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": str(folder / "disk.qcow2")},
        }
        return Opening(REGISTRY).open({**description, "backing": backing, "read-only": not writable})

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        return self._image(folder).content()

    def check_image(self, folder: Path) -> None:
        findings = self._image(folder).check()
        assert findings.corruptions + findings.flags + findings.lost_flags == []


class TestDefault(Qcow2Contract):
    """64 KiB clusters, version 3."""


class TestTinyClusters(Qcow2Contract):
    """Clusters of one sector: every table grows and moves."""

    options = {"cluster_size": "512"}


class TestHugeClusters(Qcow2Contract):
    """2 MiB: the whole disk is one cluster."""

    options = {"cluster_size": "2M"}


class TestOldVersion(Qcow2Contract):
    """Version 2 has no zero clusters."""

    options = {"compat": "0.10", "cluster_size": "4k"}


class TestNarrowCounts(Qcow2Contract):
    """Counts of one bit."""

    options = {"refcount_bits": "1", "cluster_size": "1k"}


class TestWideCounts(Qcow2Contract):
    """Counts of 64 bits: a block of them is soon full."""

    options = {"refcount_bits": "64", "cluster_size": "512"}


class TestSubclusters(Qcow2Contract):
    """Extended L2 entries, with the smallest clusters that may have them: subclusters of one sector."""

    options = {"extended_l2": "on", "cluster_size": "16k"}


class TestHugeSubclusters(Qcow2Contract):
    """Subclusters of 64 KiB."""

    options = {"extended_l2": "on", "cluster_size": "2M"}


class TestDataFile(Qcow2Contract):
    """Guest data in a file of its own."""

    data = "disk.data"


class TestDataFileOfSubclusters(Qcow2Contract):
    """Both at once."""

    data = "disk.data"
    options = {"extended_l2": "on", "cluster_size": "32k"}


class TestRawDataFile(Qcow2Contract):
    """A data file that reads like the disk."""

    data = "disk.raw"
    options = {"data_file_raw": "on", "cluster_size": "4k"}

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        return (folder / self.data).read_bytes()

    def make_overlay(self, folder: Path, backing: BlockNode, size: int) -> BlockNode:
        self.check_image = lambda folder: None  # type: ignore[method-assign]
        pytest.skip("a raw data file has no backing file")


@pytest.mark.parametrize("options", [{}, {"cluster_size": "512"}, {"compat": "0.10"}], ids=str)
def test_an_image_that_nobody_writes_is_not_touched(options: dict[str, str], tmp_path: Path) -> None:
    contract = Qcow2Contract()
    contract.options = options
    graph.close_node(contract.make_node(tmp_path, contract.content()))
    before = (tmp_path / "disk.qcow2").read_bytes()
    with Disk(contract.open_again(tmp_path), writable=True) as disk:
        disk.flush()
        disk.discard(0, 0)
    assert (tmp_path / "disk.qcow2").read_bytes() == before

"""Where bitmaps lie: the drop-in tools put directory, tables and content where QEMU's do, after every step of a life."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.formats.qcow2.bitmap import directory as bitmaps, store
from cowhand.block.formats.qcow2.bitmap.data import read_table
from cowhand.block.formats.qcow2.driver import Qcow2Node
from tests.compat.sides import run_own, run_real
from tests.tools.qemu import assert_clean, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

LIFE = """\
qemu-io -c 'write -P 1 0 3M' b.qcow2
qemu-img bitmap --add b.qcow2 one
qemu-img bitmap --add --disable -g 4096 b.qcow2 two
qemu-img bitmap --add -g 512 b.qcow2 three
qemu-io -c 'write -P 2 1M 3M' b.qcow2
qemu-img bitmap --disable b.qcow2 one
qemu-io -c 'write -P 2 7M 1M' b.qcow2
qemu-img bitmap --merge three b.qcow2 two
qemu-img bitmap --remove b.qcow2 one
qemu-io -c 'write -P 2 9M 64k' b.qcow2
qemu-img bitmap --remove --add b.qcow2 two
qemu-img bitmap --clear b.qcow2 three
qemu-img resize -q b.qcow2 20M
qemu-io -c 'write -P 2 12M 64k' b.qcow2
qemu-img bitmap --remove b.qcow2 three
qemu-img bitmap --remove b.qcow2 two
"""


def places(path: Path) -> list[Any]:
    """Return where an image has its bitmap directory, and for each bitmap its table, and the words of that."""
    with cowhand.open(path) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        directory = node.bitmap_directory
        told = [(entry.text, entry.flags, entry.table, list(read_table(node, entry))) for entry in directory]
        return [directory.offset, told, node.header.l1_offset, path.stat().st_size]


@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
def test_all_bitmaps_are_stored_again_at_each_closing(cluster: str, tmp_path: Path) -> None:
    folders = [tmp_path / "theirs", tmp_path / "ours"]
    for folder, run in zip(folders, (run_real, run_own), strict=True):
        folder.mkdir()
        create = f"qemu-img create -q -f qcow2 -o cluster_size={cluster} b.qcow2 10M"
        assert run(shlex.split(create), folder).status == 0
    for line in LIFE.splitlines():
        words = shlex.split(line)
        assert run_own(words, folders[1]).status == run_real(words, folders[0]).status == 0, line
        theirs, ours = (places(folder / "b.qcow2") for folder in folders)
        assert ours == theirs, line
    assert_clean(folders[1] / "b.qcow2")


def test_not_when_they_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str) -> Any:
        return {entry[0]: entry for entry in places(tmp_path / "b.qcow2")[1]}[name]

    def write(command: str) -> None:
        assert run_own(["qemu-io", "-c", command, "b.qcow2"], tmp_path).status == 0

    for line in ("create -q -f qcow2 b.qcow2 10M", "bitmap --add b.qcow2 a", "bitmap --add --disable b.qcow2 b"):
        assert run_own(["qemu-img", *line.split()], tmp_path).status == 0
    before = told("b")
    write("write 0 64k")
    assert told("b") != before, "a bitmap that is disabled moves with the others"
    before = told("b")
    monkeypatch.setattr(store, "MAX_ANEW_BYTES", bitmaps.MAX_ANEW_BYTES >> 10)
    write("write 64k 64k")
    assert told("b") != before, "64 KiB is all that is stored of both"
    monkeypatch.setattr(store, "MAX_ANEW_BYTES", 0)
    before = told("b")
    write("write 128k 64k")
    assert told("b") == before, "content that is as before keeps its place"
    assert told("a")[1] == bitmaps.AUTO

"""What a file is used for: the kinds add up to it, agree with the owners of every cluster, and with what check calls leaked."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

import cowhand
from cowhand.block.formats.qcow2.check.usage import FREE, LEAKED, usage
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.image.check import check
from tests.qcow2 import damage
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

pytestmark = require_qemu


def kind_of(names: list[str]) -> str:
    """Return the kind of a cluster with the owners *names*."""
    for kind, sign in (
        ("header", lambda text: text in ("the header", "the encryption header")),
        ("refcounts", lambda text: text.startswith(("refcount block", "the refcount table"))),
        ("tables", lambda text: text == "the active L1 table" or (text.startswith("L2 table") and text.endswith("of the disk"))),
        ("bitmaps", lambda text: "bitmap" in text.split("'")[0]),
        ("compressed", lambda text: text.startswith("compressed data of the disk")),
        ("data", lambda text: text.startswith("data of the disk")),
    ):  # fmt: skip
        if any(sign(name) for name in names):
            return kind
    return "snapshots"


@pytest.mark.parametrize("seed", range(12))
def test_kinds_agree_with_owners(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    rng = random.Random(seed)
    damage.make(path, rng)
    if seed % 3 == 0:
        with path.open("r+b") as file:  # a part of a cluster more, and damage
            file.seek(rng.randrange(path.stat().st_size // 8) * 8)
            file.write(bytes(8))
            file.seek(0, 2)
            file.write(bytes(100))
    try:
        disk = cowhand.open(path)
    except cowhand.core.errors.CowhandError:
        return
    with disk:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        found = usage(node)
        size, length = node.cluster_size, path.stat().st_size
        owners = node.owners(range(-(-length // size)))
        expected: Counter[str] = Counter()
        for cluster, names in owners.items():
            nbytes = min(size, length - cluster * size)
            kind = kind_of(names) if names else LEAKED if node.refcounts.get(cluster) else FREE
            expected[kind] += nbytes
    assert sum(found.values()) == length
    assert {kind: amount for kind, amount in found.items() if amount} == dict(expected)


def test_leaks_are_those_of_check(tmp_path: Path) -> None:
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,extended_l2=off", path, "8M")
    qemu_io(path, "write 0 1M", "write -c 2M 64k", "discard 0 64k")
    qemu_img("snapshot", "-c", "s", path)
    qemu_io(path, "write 0 128k")
    data = bytearray(path.read_bytes())
    data[60:72] = bytes(12)  # the snapshot is forgotten: all that it alone held is leaked
    path.write_bytes(data)
    found = check(path)
    with cowhand.open(path) as disk:
        parts = usage(disk.root)  # type: ignore[arg-type]
    # A cluster that is in use, and counted once too often, takes no space.
    lost = sum(line.endswith("reference=0") for line in found.messages)
    assert lost > 15 and parts[LEAKED] == lost * 4096
    assert parts["snapshots"] == 0


@pytest.mark.parametrize(
    "options", ["extended_l2=on,cluster_size=64k", "data_file=out.raw", "refcount_bits=1", "cluster_size=2M"]
)
def test_other_kinds_of_images(options: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if "data_file" in options:
        options = f"data_file={tmp_path / 'out.raw'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "64M")
    qemu_io(path, "write 0 3M", "write 10M 4k")
    with cowhand.open(path) as disk:
        parts = usage(disk.root)  # type: ignore[arg-type]
        assert sum(parts.values()) == path.stat().st_size
        assert parts[LEAKED] == 0 and parts["tables"] and parts["refcounts"] and parts["header"]
        assert bool(parts["data"]) == ("data_file" not in options)

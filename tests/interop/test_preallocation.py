"""All preallocation modes: what is laid out and mapped as by QEMU, what takes its space at once, and what keeps its content."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.create import create
from cowhand.copy.convert import convert
from tests.tools.qemu import assert_clean, qemu_img, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

MODES = ["metadata", "falloc", "full"]
KINDS: dict[str, dict[str, str]] = {
    "standard": {},
    "extended": {"extended_l2": "on"},
    "small": {"cluster_size": "4k"},
    "plain": {"data_file": "DATA"},
    "raw": {"data_file": "DATA", "data_file_raw": "on"},
}


def options(kind: str, path: Path, **more: str) -> dict[str, str]:
    given = {**KINDS[kind], **more}
    return {name: str(path) + ".data" if value == "DATA" else value for name, value in given.items()}


def layout(path: Path) -> list[list[Any]]:
    """Return what qemu-img says of the layout: [start, end, depth, how], without what it learns from the holes of the file."""
    merged: list[list[Any]] = []
    for row in qemu_img("map", "--output", "json", path).json():
        # Where a place is named, whether zeroes or data are there is the file's business.
        how = row["offset"] - row["start"] if "offset" in row else (row["zero"], row["data"])
        if merged and merged[-1][1:] == [row["start"], row["depth"], row["present"], how]:
            merged[-1][1] += row["length"]
        else:
            merged.append([row["start"], row["start"] + row["length"], row["depth"], row["present"], how])
    return merged


def sparse_copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def compare(ours: Path, theirs: Path, mode: str, size: int) -> None:
    assert_clean(ours)
    assert qemu_img("compare", ours, theirs, check=False).status == 0
    if mode in ("off", "metadata"):
        assert layout(ours) == layout(theirs)
    else:
        # Space is taken, in which order does not matter.
        data = Path(f"{ours}.data")
        assert (data if data.exists() else ours).stat().st_blocks * 512 >= size


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_image(kind: str, mode: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    create(ours, "qcow2", 3_000_320, options(kind, ours, preallocation=mode))
    words = ",".join(f"{name}={value}" for name, value in options(kind, theirs, preallocation=mode).items())
    qemu_img("create", "-q", "-f", "qcow2", "-o", words, theirs, "3000320")
    compare(ours, theirs, mode, 3_000_320)


@pytest.mark.parametrize("mode", ["off", *MODES[:2]])
@pytest.mark.parametrize("kind", ["standard", "extended", "plain", "raw"])
@pytest.mark.parametrize("backed", ["", "shorter", "longer"])
def test_a_larger_disk(kind: str, mode: str, backed: str, tmp_path: Path) -> None:
    """The disk ends inside a cluster before, and the backing file may reach behind its end."""
    if backed and kind == "raw":
        pytest.skip("a raw data file has no backing file")
    rng = random.Random(f"{kind} {mode} {backed}")
    old, new = 515_072, 1_400_320
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    base: list[str] = []
    if backed:
        below = tmp_path / "base"
        below.write_bytes(rng.randbytes(300_032 if backed == "shorter" else 900_096))
        base = ["-F", "raw", "-b", str(below)]
    words = ",".join(f"{name}={value}" for name, value in options(kind, ours).items())
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", words] if words else []), *base, ours, str(old))
    # Inside the last cluster, and inside the last subcluster but one.
    written = rng.choice(["write -P 7 448k 20k", "write -P 7 0 100k", "write -P 7 460k 43k", "write -z 448k 55k"])
    qemu_io(ours, written, format="qcow2")
    content = cowhand.open(ours)
    before = content.read(0, old)
    content.close()
    sparse_copy(ours, theirs)
    given: list[str] = []
    if "data_file" in KINDS[kind]:
        sparse_copy(Path(f"{ours}.data"), Path(f"{theirs}.data"))
        qemu_img("amend", "-f", "qcow2", "-o", f"data_file={theirs}.data", theirs)
    qemu_img("resize", "-q", "-f", "qcow2", f"--preallocation={mode}", *given, theirs, str(new))
    with cowhand.open(ours, writable=True) as disk:
        disk.resize(new, preallocation=mode)
        assert disk.read(0, new) == before.ljust(new, b"\0")
    compare(ours, theirs, mode, new - old)


@pytest.mark.parametrize("mode", ["off", "metadata"])
@pytest.mark.parametrize("kind", ["standard", "extended"])
@pytest.mark.parametrize("held", ["shared", "compressed", "partial"])
def test_the_last_cluster_keeps_what_it_holds(kind: str, mode: str, held: str, tmp_path: Path) -> None:
    """The disk ends inside a cluster that is shared with a snapshot, or compressed, or of which subclusters hold data."""
    path, old, new = tmp_path / "disk", 515_072, 1_400_320
    create(path, "qcow2", old, options(kind, path))
    qemu_io(path, "write -P 7 448k 55k" if held == "shared" else "write -P 7 460k 43k", format="qcow2")
    if held == "shared":
        qemu_img("snapshot", "-c", "s", path)
    if held == "compressed":
        convert(path, tmp_path / "other", "qcow2", options=options(kind, path), compressed=True)
        path = tmp_path / "other"
    with cowhand.open(path, writable=True) as disk:
        before = disk.read(0, old)
        assert before.count(7) >= 43 << 10
        disk.resize(new, preallocation=mode)
        assert disk.read(0, new) == before.ljust(new, b"\0")
    assert_clean(path)
    with cowhand.open(path, writable=True) as disk:
        disk.write(old - 1000, b"x" * 2000)
        assert disk.read(0, new) == (before[:-1000] + b"x" * 2000).ljust(new, b"\0")
    assert_clean(path)

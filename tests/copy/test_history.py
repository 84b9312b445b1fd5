"""Copying with internal snapshots: every state of the copy is that of the source, and what states share is stored once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.image.create import create
from cowhand.image.snapshots import create_snapshot, delete_snapshot, list_snapshots, open_snapshot
from tests.tools.qemu import assert_clean, qemu_img, qemu_info, require_qemu

MIB = 1 << 20


def states(path: Path) -> list[tuple[object, bytes, bytes]]:
    """Return (record, content, VM state) of every snapshot, and the present content."""
    out: list[tuple[object, bytes, bytes]] = []
    with cowhand.open(path) as disk:
        for info in list_snapshots(disk):
            with open_snapshot(disk, info.id) as view:
                state = view.read_vmstate(0, info.vm_state_size) if info.vm_state_size else b""
                out.append((info, view.read(0, view.size), state))
        out.append((disk.size, disk.read(0, disk.size), b""))
    return out


def lived(path: Path, rng: random.Random, *, backing: Path | None = None) -> Path:
    """Make an image with a history: writes, zeroes, discards, compressed clusters, growth, VM states, a snapshot that was deleted."""
    below = {"backing": str(backing), "backing_format": "raw"} if backing else {}
    create(path, "qcow2", 4 * MIB, options={"cluster_size": rng.choice(("4k", "64k"))}, **below)  # type: ignore[arg-type]
    with cowhand.open(path, writable=True) as disk:
        for number in range(5):
            for _ in range(6):
                change(disk, rng)
            state = 0
            if number % 2:
                state = 100_000
                disk.write_vmstate(0, rng.randbytes(state))
            times = {"date": (1_700_000_000 + number, 5), "vm_clock_nsec": number * 7, "icount": number or None}
            create_snapshot(disk, f"s{number}", vm_state_size=state, **times)  # type: ignore[arg-type]
            if number == 2:
                disk.resize(6 * MIB)
        delete_snapshot(disk, "2")
        disk.resize(5 * MIB, shrink=True)
        change(disk, rng)
    return path


def change(disk: Disk, rng: random.Random) -> None:
    offset = rng.randrange(disk.size // 512 - 256) * 512
    length = rng.choice((512, 4096, 70_000 // 512 * 512, 131_072))
    kind = rng.random()
    if kind < 0.6:
        disk.write(offset, rng.randbytes(length))
    elif kind < 0.8:
        disk.write_zeroes(offset, length)
    else:
        disk.discard(offset, length)


@require_qemu
@pytest.mark.parametrize("seed", range(4))
def test_every_state_is_the_same(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    base = None
    if seed == 3:
        base = tmp_path / "base"
        base.write_bytes(rng.randbytes(3 * MIB))
    source = lived(tmp_path / "a", rng, backing=base)
    target = tmp_path / "b"
    convert(source, target, "qcow2", snapshots=True, compressed=seed == 2)
    assert states(target) == states(source)
    assert_clean(target)
    assert [one["id"] for one in qemu_info(target)["snapshots"]] == ["1", "3", "4", "5"]
    # QEMU sees the same states.
    for name in ("s0", "s3"):
        for path in (source, target):
            qemu_img("convert", "-l", name, "-O", "raw", path, f"{path}.{name}")
        assert Path(f"{source}.{name}").read_bytes() == Path(f"{target}.{name}").read_bytes()


@require_qemu
def test_what_states_share_stays_shared(tmp_path: Path) -> None:
    source, target, again = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    create(source, "qcow2", 16 * MIB)
    with cowhand.open(source, writable=True) as disk:
        disk.write(0, random.Random(1).randbytes(8 * MIB))
        for number in range(4):
            create_snapshot(disk, f"s{number}")
            disk.write(number * MIB, b"x" * 65536)
    convert(source, target, "qcow2", snapshots=True)
    assert target.stat().st_size < 9.5 * MIB
    assert states(target) == states(source)
    # Compressed clusters that two states share are known to be alike.
    convert(target, again, "qcow2", snapshots=True, compressed=True)
    with cowhand.open(again) as disk:
        moved = convert(disk, tmp_path / "d", "qcow2", snapshots=True)
    assert moved.copied <= 8.5 * MIB
    assert states(tmp_path / "d") == states(source)
    assert_clean(tmp_path / "d")


def test_contradictions_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a"
    create(source, "qcow2", MIB)
    create(tmp_path / "n", "qcow2", MIB)
    for settings, words in (
        ({"skip_create": True}, "existing target"),
        ({"snapshot": "x"}, "no snapshot 'x'"),
        ({"backing": str(source), "backing_format": "qcow2"}, "backing file"),
        ({"salvage": True}, "salvaging"),
        ({"options": {"data_file": str(tmp_path / "o.raw")}}, "data file"),
        ({"sparse_size": 0}, "sparse size"),
    ):
        with pytest.raises(CowhandError, match=words):
            convert(source, tmp_path / "n", "qcow2", snapshots=True, overwrite=True, **settings)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="several sources"):
        convert([source, source], tmp_path / "o", "qcow2", snapshots=True)
    with pytest.raises(CowhandError, match="has no internal snapshots"):
        convert(source, tmp_path / "o", "raw", snapshots=True)
    (tmp_path / "r").write_bytes(bytes(MIB))
    with pytest.raises(CowhandError):
        convert(tmp_path / "r", tmp_path / "o", "qcow2", source_format="raw", snapshots=True)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.raw").exists()

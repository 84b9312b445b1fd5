"""``cowhand bitmap``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import cowhand
from tests.cli.images import MiB, image
from tests.tools.qemu import assert_clean, qemu_img, qemu_info, qemu_io, require_qemu

KIB = 1024


@pytest.fixture
def path(image_dir: Path) -> Path:
    """Return an empty image of 8 MiB."""
    image(image_dir / "a")
    return image_dir / "a"


def flags(path: Path) -> dict[str, list[str]]:
    return {one["name"]: one["flags"] for one in qemu_info(path)["format-specific"]["data"].get("bitmaps", [])}


@require_qemu
def test_life_of_a_bitmap(path: Path) -> None:
    folder = path.parent
    assert cowhand("bitmap", "add", "a", "night", "-g", "4k", cwd=folder).stdout == "added bitmap night to a\n"
    cowhand("bitmap", "add", "a", "week", "--disabled", cwd=folder)
    qemu_io(path, "write 1M 10k", "write 3M 64k")
    lines = cowhand("bitmap", "dirty", "a", "night", cwd=folder).stdout.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["start", "length"], [f"{MiB:#x}", f"{12 * KIB:#x}"], [f"{3 * MiB:#x}", f"{64 * KIB:#x}"],
    ]  # fmt: skip
    assert lines[3] == "76 KiB of 8 MiB dirty, in 2 pieces"
    assert cowhand("bitmap", "merge", "a", "week", "night", cwd=folder).stdout == "merged night into bitmap week of a\n"
    document = cowhand("bitmap", "dirty", "--output", "json", "a", "week", cwd=folder).json()
    assert document["extents"] == [{"start": MiB, "length": 64 * KIB}, {"start": 3 * MiB, "length": 64 * KIB}]
    assert (document["dirty-bytes"], document["enabled"], document["granularity"]) == (128 * KIB, False, 64 * KIB)
    cowhand("bitmap", "clear", "a", "night", cwd=folder)
    assert cowhand("bitmap", "dirty", "a", "night", cwd=folder).stdout == "0 B of 8 MiB dirty, in 0 pieces\n"
    cowhand("bitmap", "enable", "a", "week", cwd=folder)
    cowhand("bitmap", "disable", "a", "night", cwd=folder)
    assert flags(path) == {"night": [], "week": ["auto"]}
    cowhand("bitmap", "remove", "a", "night", cwd=folder)
    assert flags(path) == {"week": ["auto"]}
    assert_clean(path)


@require_qemu
def test_list(path: Path) -> None:
    assert cowhand("bitmap", "list", path).stdout == f"{path} has no bitmaps\n"
    assert cowhand("bitmap", "list", "--output", "json", path).json() == []
    for name in ("one", "two"):
        qemu_img("bitmap", "--add", path, name)
    qemu_img("bitmap", "--disable", path, "two")
    qemu_io(path, "write 0 64k", "abort", check=False)
    cowhand("bitmap", "add", path, "three")
    rows = [line.split(maxsplit=4) for line in cowhand("bitmap", "list", path).stdout.splitlines()]
    assert rows[0] == ["bitmap", "granularity", "state", "dirty"]
    assert rows[1] == ["one", "64", "KiB", "inconsistent", "unknown: not stored after the last writes"]
    assert rows[3] == ["three", "64", "KiB", "recording", "0 B"]
    first, _, last = cowhand("bitmap", "list", "--output", "json", path).json()
    assert first["inconsistent"] and first["dirty-bytes"] is None
    assert last == {"name": "three", "granularity": 65536, "enabled": True, "inconsistent": False, "dirty-bytes": 0}
    failed = cowhand("bitmap", "dirty", "--output", "json", path, "one", status=1)
    assert failed.error()["code"] == "bitmap-unusable"


@require_qemu
def test_bitmaps_of_another_image_are_merged(path: Path) -> None:
    other = path.with_name("other")
    qemu_img("create", "-q", "-f", "qcow2", other, "8M")
    qemu_img("bitmap", "--add", other, "theirs")
    qemu_io(other, "write 2M 64k")
    cowhand("bitmap", "add", path, "all")
    cowhand("bitmap", "merge", path, "all", "theirs", "-b", other, "-F", "qcow2")
    document = cowhand("bitmap", "dirty", "--output", "json", path, "all").json()
    assert document["extents"] == [{"start": 2 * MiB, "length": 64 * KIB}]


@pytest.mark.parametrize(
    "words", [("add", "new"), ("remove", "b"), ("clear", "b"), ("enable", "b"), ("disable", "b"), ("merge", "b", "b")]
)
def test_a_dry_run_changes_nothing(path: Path, words: tuple[str, ...]) -> None:
    cowhand("bitmap", "add", path, "b")
    before = path.read_bytes()
    action, *names = words
    plan = cowhand("bitmap", action, path, *names, "--dry-run", "--output", "json").json()
    assert plan["dry-run"] and plan["undo"] and plan["action"].startswith(f"{action} bitmap {names[0]}")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (("add",), "the bitmap needs a name", 2),
        (("list", "b"), "list takes an image alone", 2),
        (("merge", "b"), "which bitmap is to be merged?", 2),
        (("clear", "b", "c"), "clear takes one bitmap", 2),
        (("clear", "b", "-g", "4k"), "--granularity and --disabled are for add", 2),
        (("clear", "b", "-b", "x"), "--source-file is for merge", 2),
        (("add", "b", "-g", "1000"), "Granularity must be power of 2", 1),
        (("add", "b"), "Bitmap already exists: b", 1),
        (("add", "b", "--dry-run"), "Bitmap already exists: b", 1),
        (("remove", "nobody"), "Dirty bitmap 'nobody' not found", 1),
        (("remove", "nobody", "--dry-run"), "Dirty bitmap 'nobody' not found", 1),
        (("dirty", "nobody"), "Dirty bitmap 'nobody' not found", 1),
    ],
)
def test_refusals(path: Path, words: tuple[str, ...], message: str, status: int) -> None:
    cowhand("bitmap", "add", path, "b")
    before = path.read_bytes()
    action, *names = words
    assert message in cowhand("bitmap", action, path, *names, status=status).stderr
    assert path.read_bytes() == before


def test_a_name_that_steers_a_terminal_is_shown_and_warned_of(path: Path) -> None:
    cowhand("bitmap", "add", path, "a\x1b[31mb")
    shown = cowhand("bitmap", "list", path).stdout
    assert "\x1b" not in shown and "a\\x1b[31mb" in shown
    judged = cowhand("inspect", "--untrusted", "--output", "json", path, status=8)
    assert "control-characters" in judged.stdout

"""``cowhand convert``, ``compare``, ``dd`` and ``measure``."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image, snapshot_of
from tests.tools.qemu import assert_clean, assert_identical, qemu_img, require_qemu


@pytest.fixture
def raw(image_dir: Path, rng: random.Random) -> Path:
    """Return a raw disk of 8 MiB with data, zeroes and a hole."""
    with open(image_dir / "disk.raw", "wb") as file:
        file.write(rng.randbytes(MiB) + bytes(MiB) + b"text " * (MiB // 5))
        file.truncate(8 * MiB)
    return image_dir / "disk.raw"


class TestConvert:
    @require_qemu
    @pytest.mark.parametrize(
        "more", [(), ("-c",), ("-o", "cluster_size=4k"), ("-c", "-o", "compression_type=zstd"), ("-W", "-m", "3")]
    )
    def test_qemu_img_finds_the_copy_clean_and_identical(self, raw: Path, more: tuple[str, ...]) -> None:
        cowhand("convert", "-O", "qcow2", *more, "disk.raw", "copy", cwd=raw.parent)
        assert_clean(raw.parent / "copy")
        assert_identical(raw, "raw", raw.parent / "copy", "qcow2")

    def test_there_and_back(self, raw: Path) -> None:
        cowhand("convert", "-c", "disk.raw", "copy.qcow2", cwd=raw.parent)
        cowhand("convert", "copy.qcow2", "back.raw", cwd=raw.parent)
        assert (raw.parent / "back.raw").read_bytes() == raw.read_bytes()
        assert (raw.parent / "copy.qcow2").stat().st_size < 2 * MiB

    def test_tells_what_it_did(self, raw: Path) -> None:
        document = cowhand("convert", "--verify", "--output", "json", "disk.raw", "copy.qcow2", cwd=raw.parent).json()
        assert document["virtual-size"] == 8 * MiB
        assert document["format"] == "qcow2"
        assert document["verified"] is True
        assert 2 * MiB <= document["copied"] <= 3 * MiB
        assert document["copied"] + document["zeroes"] == 8 * MiB
        text = cowhand("convert", "--verify", "disk.raw", "copy2.qcow2", cwd=raw.parent).stdout
        assert text.startswith("copied ") and text.endswith(" of 8 MiB to copy2.qcow2, verified\n")

    def test_never_overwrites_without_being_told(self, raw: Path) -> None:
        (raw.parent / "copy.qcow2").write_text("precious")
        assert "--overwrite" in cowhand("convert", "disk.raw", "copy.qcow2", cwd=raw.parent, status=1).stderr
        assert (raw.parent / "copy.qcow2").read_text() == "precious"
        cowhand("convert", "--overwrite", "disk.raw", "copy.qcow2", cwd=raw.parent)
        assert content(raw.parent / "copy.qcow2") == raw.read_bytes()

    @pytest.mark.parametrize("words", [("--verify", "disk.raw", "disk.raw"), ("--bitmaps", "-l", "s", "disk.raw")])
    def test_what_contradicts_itself_is_refused_before_anything_is_made(
        self, raw: Path, words: tuple[str, ...]
    ) -> None:
        cowhand("convert", *words, "copy.qcow2", cwd=raw.parent, status=2)
        assert [path.name for path in raw.parent.iterdir()] == ["disk.raw"]

    def test_into_an_existing_image(self, raw: Path) -> None:
        target = image(raw.parent / "target.qcow2", 8 * MiB)
        fill(target, 5 * MiB, MiB, 9)
        cowhand("convert", "-n", "disk.raw", "target.qcow2", cwd=raw.parent)
        assert content(target) == raw.read_bytes()

    def test_does_not_write_over_the_base_of_others(self, raw: Path) -> None:
        base = image(raw.parent / "base.qcow2")
        image(raw.parent / "work.qcow2", backing=base)
        before = snapshot_of(raw.parent)
        for flag in ("-n", "--overwrite"):
            assert "work.qcow2" in cowhand("convert", flag, "disk.raw", "base.qcow2", cwd=raw.parent, status=9).stderr
        assert snapshot_of(raw.parent) == before

    def test_an_overlay_keeps_to_its_own(self, raw: Path) -> None:
        base = image(raw.parent / "base.qcow2")
        fill(base, 0, 4 * MiB, 1)
        work = image(raw.parent / "work.qcow2", backing=base)
        fill(work, MiB, MiB, 2)
        text = cowhand("convert", "-B", "base.qcow2", "-F", "qcow2", "work.qcow2", "copy.qcow2", cwd=raw.parent).stdout
        assert "left to base.qcow2" in text
        assert content(raw.parent / "copy.qcow2") == content(work)
        assert (raw.parent / "copy.qcow2").stat().st_size < 2 * MiB

    def test_dry_run_tells_what_would_be_read_and_written(self, raw: Path) -> None:
        before = snapshot_of(raw.parent)
        plan = cowhand("convert", "--dry-run", "--output", "json", "disk.raw", "copy.qcow2", cwd=raw.parent).json()
        assert plan["reads"][0]["path"] == "disk.raw"
        assert 2 * MiB <= plan["moves"] <= 4 * MiB
        assert plan["writes"][0]["bytes"] >= plan["moves"]
        assert plan["undo"] == "delete copy.qcow2"
        assert snapshot_of(raw.parent) == before

    def test_a_failure_leaves_no_half_made_target(self, raw: Path) -> None:
        before = snapshot_of(raw.parent)
        cowhand("convert", "-f", "qcow2", "disk.raw", "copy.qcow2", cwd=raw.parent, status=4)
        cowhand("convert", "absent", "copy.qcow2", cwd=raw.parent, status=1)
        cowhand("convert", "-O", "wrong", "disk.raw", "copy.qcow2", cwd=raw.parent, status=1)
        cowhand("convert", "-m", "99", "disk.raw", "copy.qcow2", cwd=raw.parent, status=1)
        assert snapshot_of(raw.parent) == before

    def test_progress_is_lines_where_nobody_looks(self, raw: Path) -> None:
        done = cowhand("convert", "-p", "disk.raw", "copy.qcow2", cwd=raw.parent)
        assert "disk.raw → copy.qcow2: 100%" in done.stderr and "/s" in done.stderr
        assert cowhand("convert", "disk.raw", "copy2.qcow2", cwd=raw.parent).stderr == ""

    @require_qemu
    def test_what_a_copy_does_not_carry_over_is_said(self, raw: Path) -> None:
        cowhand("convert", "disk.raw", "a.qcow2", cwd=raw.parent)
        cowhand("snapshot", "create", "a.qcow2", "one", cwd=raw.parent)
        qemu_img("bitmap", "--add", raw.parent / "a.qcow2", "daily")
        done = cowhand("convert", "a.qcow2", "b.qcow2", cwd=raw.parent)
        assert "1 internal snapshot is not copied" in done.stderr and "dirty bitmaps are not copied" in done.stderr
        assert "snapshot" not in cowhand("convert", "-l", "one", "a.qcow2", "c.qcow2", cwd=raw.parent).stderr

    def test_several_sources_become_one_disk(self, raw: Path) -> None:
        cowhand("convert", "disk.raw", "disk.raw", "both.qcow2", cwd=raw.parent)
        assert content(raw.parent / "both.qcow2") == raw.read_bytes() * 2


class TestCompare:
    def test_same(self, raw: Path) -> None:
        cowhand("convert", "disk.raw", "copy.qcow2", cwd=raw.parent)
        assert cowhand("compare", "disk.raw", "copy.qcow2", cwd=raw.parent).stdout == "the disks are the same\n"

    def test_different(self, raw: Path) -> None:
        cowhand("convert", "disk.raw", "copy.qcow2", cwd=raw.parent)
        fill(raw.parent / "copy.qcow2", 7 * MiB + 700, 1, 1)
        done = cowhand("compare", "disk.raw", "copy.qcow2", cwd=raw.parent, status=6)
        assert done.stdout == f"the bytes differ at 0x700200 ({7 * MiB + 512})\n"
        document = cowhand("compare", "--output", "json", "disk.raw", "copy.qcow2", cwd=raw.parent, status=6).json()
        assert document == {"identical": False, "reason": "content", "offset": 7 * MiB + 512, "sizes-differ": False}

    def test_sizes(self, raw: Path) -> None:
        longer = raw.parent / "longer.raw"
        longer.write_bytes(raw.read_bytes() + bytes(MiB))
        assert "except for zeroes" in cowhand("compare", "disk.raw", "longer.raw", cwd=raw.parent).stdout
        assert "the sizes differ" in cowhand("compare", "-s", "disk.raw", "longer.raw", cwd=raw.parent, status=6).stdout

    def test_an_absent_image_is_no_difference(self, raw: Path) -> None:
        assert "absent" in cowhand("compare", "disk.raw", "absent", cwd=raw.parent, status=1).stderr


class TestDd:
    @require_qemu
    @pytest.mark.parametrize("more", [(), ("count=3",), ("skip=2",), ("skip=1", "count=3"), ("skip=100",)])
    def test_copies_what_qemu_img_copies(self, raw: Path, more: tuple[str, ...]) -> None:
        cowhand("dd", "if=disk.raw", "of=ours.raw", "bs=1M", *more, cwd=raw.parent)
        qemu_img("dd", "-f", "raw", "-O", "raw", f"if={raw}", f"of={raw.parent / 'theirs.raw'}", "bs=1M", *more)
        assert (raw.parent / "ours.raw").read_bytes() == (raw.parent / "theirs.raw").read_bytes()

    def test_into_another_format(self, raw: Path) -> None:
        document = cowhand(
            "dd", "--output", "json", "if=disk.raw", "of=part.qcow2", "bs=1M", "count=2", cwd=raw.parent
        ).json()
        assert (document["format"], document["virtual-size"]) == ("qcow2", 2 * MiB)
        assert content(raw.parent / "part.qcow2") == raw.read_bytes()[: 2 * MiB]

    def test_plans(self, raw: Path) -> None:
        plan = cowhand(
            "dd", "--dry-run", "--output", "json", "if=disk.raw", "of=x", "bs=1M", "skip=7", cwd=raw.parent
        ).json()
        assert plan["moves"] == 0
        assert not (raw.parent / "x").exists()

    def test_mistakes(self, raw: Path) -> None:
        assert "of= is missing" in cowhand("dd", "if=disk.raw", cwd=raw.parent, status=2).stderr
        assert (
            "'conv=sync' is not an operand"
            in cowhand("dd", "if=a", "of=b", "conv=sync", cwd=raw.parent, status=2).stderr
        )
        (raw.parent / "there").write_text("precious")
        assert "--overwrite" in cowhand("dd", "if=disk.raw", "of=there", cwd=raw.parent, status=1).stderr
        assert (raw.parent / "there").read_text() == "precious"


class TestMeasure:
    @require_qemu
    def test_figures_are_those_of_qemu_img(self, raw: Path) -> None:
        for more in (("-O", "qcow2", "disk.raw"), ("-O", "raw", "disk.raw"), ("-O", "qcow2", "--size", "100G")):
            ours = cowhand("measure", "--output", "json", *more, cwd=raw.parent).json()
            arguments = [str(raw) if name == "disk.raw" else name for name in more]
            theirs = qemu_img("measure", "--output=json", *arguments).json()
            assert {name: theirs[name] for name in ours} == ours

    def test_promises_what_a_conversion_keeps(self, raw: Path) -> None:
        required = cowhand("measure", "--output", "json", "-O", "qcow2", "disk.raw", cwd=raw.parent).json()["required"]
        cowhand("convert", "disk.raw", "copy.qcow2", cwd=raw.parent)
        assert os.stat(raw.parent / "copy.qcow2").st_size <= required

    def test_text(self) -> None:
        assert (
            cowhand("measure", "-O", "raw", "--size", "1M").stdout.splitlines()[0]
            == "required:        1 MiB (1048576 bytes)"
        )

    def test_wants_one_thing(self, raw: Path) -> None:
        cowhand("measure", status=2)
        cowhand("measure", "--size", "1G", "disk.raw", cwd=raw.parent, status=2)


def test_snapshots_and_bitmaps_go_with_a_copy(image_dir: Path) -> None:
    path, copy = image_dir / "a", image_dir / "b.qcow2"
    image(path)
    fill(path, 0, MiB, 1)
    cowhand("snapshot", "create", path, "before")
    cowhand("bitmap", "add", path, "night")
    fill(path, MiB, MiB, 2)
    plain = cowhand("convert", path, image_dir / "c.qcow2")
    assert "snapshot is not copied" in plain.stderr and "bitmaps are not copied" in plain.stderr
    told = cowhand("convert", "--snapshots", "--bitmaps", "--verify", path, copy)
    assert not told.stderr and told.stdout.endswith("verified\n")
    assert cowhand("snapshot", "list", "--output", "json", copy).json() == (
        cowhand("snapshot", "list", "--output", "json", path).json()
    )
    assert cowhand("bitmap", "dirty", "--output", "json", copy, "night").json()["extents"] == [
        {"start": MiB, "length": MiB}
    ]
    refused = cowhand("convert", "--skip-broken-bitmaps", path, image_dir / "d.qcow2", status=1)
    assert "requires --bitmaps" in refused.stderr


def test_a_dry_run_looks_at_the_size_of_an_existing_target(raw: Path) -> None:
    cowhand("create", "-f", "qcow2", "short.qcow2", "64k", cwd=raw.parent)
    before = (raw.parent / "short.qcow2").read_bytes()
    told = cowhand("convert", "-n", "--dry-run", "disk.raw", "short.qcow2", cwd=raw.parent).stderr
    assert "it does not fit: short.qcow2 is a disk of 64 KiB" in told
    assert (raw.parent / "short.qcow2").read_bytes() == before

"""``cowhand create``."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowhand as library
from tests.cli.command import cowhand
from tests.cli.images import MiB, fill, image, snapshot_of
from tests.tools.qemu import assert_clean, qemu_info, require_qemu


@require_qemu
def test_makes_what_qemu_img_takes(image_dir: Path) -> None:
    done = cowhand("create", "-f", "qcow2", "-o", "cluster_size=4k,compat=0.10", "a", "3M", cwd=image_dir)
    assert done.stdout == "created a: qcow2, 3 MiB\n"
    info = qemu_info(image_dir / "a")
    assert (info["format"], info["virtual-size"], info["cluster-size"]) == ("qcow2", 3 * MiB, 4096)
    assert info["format-specific"]["data"]["compat"] == "0.10"
    assert_clean(image_dir / "a")


def test_json_tells_what_was_made(image_dir: Path) -> None:
    document = cowhand("create", "--output", "json", "-f", "qcow2", "a", "1G", cwd=image_dir).json()
    assert document["filename"] == "a"
    assert document["format"] == "qcow2"
    assert document["virtual-size"] == 1 << 30
    assert document["options"]["cluster_size"] == 65536


@pytest.mark.parametrize(
    ("name", "format"), [("a.qcow2", "qcow2"), ("a.QCOW2", "qcow2"), ("a.raw", "raw"), ("a.img", "raw"), ("a", "raw")]
)
def test_the_name_tells_the_format_where_nobody_does(image_dir: Path, name: str, format: str) -> None:
    assert cowhand("create", "--output", "json", name, "1M", cwd=image_dir).json()["format"] == format


def test_an_overlay_takes_its_size_from_the_base(image_dir: Path) -> None:
    image(image_dir / "base", 5 * MiB)
    cowhand("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "work", cwd=image_dir)
    fill(image_dir / "base", MiB, 10, 7)
    with library.open(image_dir / "work") as disk:
        assert disk.size == 5 * MiB
        assert disk.read(MiB, 10) == b"\7" * 10


def test_a_base_that_is_not_there_is_refused_unless_unsafe(image_dir: Path) -> None:
    done = cowhand("create", "-f", "qcow2", "-b", "absent", "-F", "qcow2", "work", cwd=image_dir, status=1)
    assert "absent" in done.stderr
    assert not (image_dir / "work").exists()
    cowhand("create", "-f", "qcow2", "-u", "-b", "absent", "-F", "qcow2", "work", "1M", cwd=image_dir)


def test_never_overwrites_without_being_told(image_dir: Path) -> None:
    path = image(image_dir / "a")
    fill(path, 0, 10, 1)
    before = snapshot_of(image_dir)
    done = cowhand("create", "-f", "qcow2", "a", "1M", cwd=image_dir, status=1)
    assert "'a' exists already" in done.stderr and "--overwrite" in done.stderr
    assert snapshot_of(image_dir) == before
    cowhand("create", "-f", "qcow2", "--overwrite", "a", "1M", cwd=image_dir)
    with library.open(path) as disk:
        assert (disk.size, disk.read(0, 10)) == (MiB, bytes(10))


def test_does_not_overwrite_the_base_of_others(image_dir: Path) -> None:
    base = image(image_dir / "base")
    image(image_dir / "work", backing=base)
    before = snapshot_of(image_dir)
    done = cowhand("create", "-f", "qcow2", "--overwrite", "base", "1M", cwd=image_dir, status=9)
    assert "work" in done.stderr and "--force" in done.stderr
    assert snapshot_of(image_dir) == before
    assert "warning" in cowhand("create", "-f", "qcow2", "--overwrite", "--force", "base", "1M", cwd=image_dir).stderr


def test_dry_run_changes_nothing(image_dir: Path) -> None:
    plan = cowhand("create", "--dry-run", "--output", "json", "-f", "qcow2", "a", "1M", cwd=image_dir).json()
    assert plan["dry-run"] is True
    assert plan["writes"] == [{"path": "a", "what": "new file", "bytes": None}]
    assert plan["undo"] == "delete a"
    assert "nothing was changed" in cowhand("create", "--dry-run", "-f", "qcow2", "a", "1M", cwd=image_dir).stdout
    assert list(image_dir.iterdir()) == []


def test_explains_the_options(image_dir: Path) -> None:
    assert "cluster_size" in cowhand("create", "-f", "qcow2", "-o", "help").stdout
    names = [item["name"] for item in cowhand("create", "-f", "qcow2", "-o", "help", "--output", "json").json()]
    assert {"cluster_size", "compat", "size"} <= set(names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a",), "size"),
        (("a", "1e3"), "not a size"),
        (("a", "9E"), "out of range"),
        (("-f", "wrong", "a", "1M"), "Unknown file format 'wrong'"),
        (("-f", "qcow2", "-o", "wrong=1", "a", "1M"), "wrong"),
        (("-f", "qcow2", "-o", "cluster_size=3k", "a", "1M"), "luster size"),
        (("-f", "raw", "-b", "x", "-F", "raw", "a", "1M"), "Backing file not supported"),
        (("disk.VMDK", "1M"), "a VMDK image"),
        (("-f", "qcow2", "-o", "cluster_sise=4k", "a", "1M"), "Did you mean 'cluster_size'?"),
        (("absent/a", "1M"), "No such file"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(image_dir: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in cowhand("create", *arguments, cwd=image_dir, status=1).stderr
    assert list(image_dir.iterdir()) == []


def test_quiet_says_nothing(image_dir: Path) -> None:
    done = cowhand("create", "-q", "a", "1M", cwd=image_dir)
    assert done.stdout + done.stderr == ""


def test_a_name_is_missing(image_dir: Path) -> None:
    assert "needs a name" in cowhand("create", cwd=image_dir, status=2).stderr

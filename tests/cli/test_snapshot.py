"""``cowhand snapshot``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image, snapshot_of
from tests.tools.qemu import assert_clean, qemu_img, qemu_info, require_qemu


@pytest.fixture
def path(image_dir: Path) -> Path:
    """Return an image with 1 in its first MiB."""
    image(image_dir / "a")
    fill(image_dir / "a", 0, MiB, 1)
    return image_dir / "a"


@require_qemu
def test_create_apply_delete(path: Path) -> None:
    folder = path.parent
    first = content(path)
    assert cowhand("snapshot", "create", "a", "before", cwd=folder).stdout == "created snapshot before of a\n"
    fill(path, 0, 2 * MiB, 2)
    second = content(path)
    cowhand("snapshot", "create", "a", "after", cwd=folder)
    assert [item["name"] for item in qemu_info(path)["snapshots"]] == ["before", "after"]
    assert_clean(path)
    assert cowhand("snapshot", "apply", "a", "before", cwd=folder).stdout == "went back to snapshot before of a\n"
    assert content(path) == first
    cowhand("snapshot", "apply", "a", "2", cwd=folder)
    assert content(path) == second
    document = cowhand("snapshot", "delete", "--output", "json", "a", "before", cwd=folder).json()
    assert (document["action"], document["snapshot"]["id"], document["snapshot"]["name"]) == ("delete", "1", "before")
    assert content(path) == second
    assert_clean(path)
    assert [item["name"] for item in qemu_info(path)["snapshots"]] == ["after"]


@require_qemu
def test_those_of_qemu_img_are_understood(path: Path) -> None:
    first = content(path)
    qemu_img("snapshot", "-c", "theirs", path)
    fill(path, 0, MiB, 2)
    assert "theirs" in cowhand("snapshot", "list", path).stdout
    cowhand("snapshot", "apply", path, "theirs")
    assert content(path) == first


def test_list(path: Path) -> None:
    assert cowhand("snapshot", "list", path).stdout == f"{path} has no snapshots\n"
    assert cowhand("snapshot", "list", "--output", "json", path).json() == []
    cowhand("snapshot", "create", path, "one", COWHAND_CLOCK="1700000000.5")
    lines = cowhand("snapshot", "list", path).stdout.splitlines()
    assert lines[0].split() == ["id", "snapshot", "date", "disk", "size", "VM", "state"]
    assert lines[1].split() == ["1", "one", "2023-11-14", "22:13:20", "8", "MiB"]
    document = cowhand("snapshot", "list", "--output", "json", path).json()
    assert document == cowhand("info", "--output", "json", path).json()["snapshots"]
    assert (document[0]["date-sec"], document[0]["date-nsec"], document[0]["disk-size"]) == (
        1700000000,
        500000000,
        8 * MiB,
    )


def test_names_are_not_given_twice(path: Path) -> None:
    cowhand("snapshot", "create", path, "one")
    before = snapshot_of(path.parent)
    assert "exists already" in cowhand("snapshot", "create", path, "one", status=1).stderr
    assert "exists already" in cowhand("snapshot", "create", path, "1", status=1).stderr
    assert snapshot_of(path.parent) == before


@pytest.mark.parametrize("action", ["apply", "delete"])
def test_an_unknown_one_is_told_with_those_that_exist(path: Path, action: str) -> None:
    cowhand("snapshot", "create", path, "one")
    before = snapshot_of(path.parent)
    done = cowhand("snapshot", action, path, "two", status=1)
    assert "there is no snapshot 'two'" in done.stderr and "one" in done.stderr
    assert snapshot_of(path.parent) == before


def test_applying_does_not_change_what_others_read(path: Path) -> None:
    cowhand("snapshot", "create", path, "one")
    fill(path, 0, MiB, 2)
    image(path.parent / "work", backing=path)
    before = snapshot_of(path.parent)
    assert "work" in cowhand("snapshot", "apply", path, "one", status=9).stderr
    assert snapshot_of(path.parent) == before
    assert "warning" in cowhand("snapshot", "apply", "--force", path, "one").stderr


def test_creating_and_deleting_harm_no_overlay(path: Path) -> None:
    work = image(path.parent / "work", backing=path)
    cowhand("snapshot", "create", path, "one")
    cowhand("snapshot", "delete", path, "one")
    assert content(work) == content(path)


@pytest.mark.parametrize("action", ["create", "apply", "delete"])
def test_dry_run_changes_nothing(path: Path, action: str) -> None:
    cowhand("snapshot", "create", path, "one")
    before = snapshot_of(path.parent)
    name = "two" if action == "create" else "one"
    plan = cowhand("snapshot", action, "--dry-run", "--output", "json", path, name).json()
    assert (plan["moves"], plan["writes"][0]["path"]) == (0, str(path))
    assert bool(plan["warnings"]) == (action == "apply")
    assert plan["undo"]
    assert snapshot_of(path.parent) == before


def test_the_size_goes_back_too(path: Path) -> None:
    cowhand("snapshot", "create", path, "small")
    cowhand("resize", path, "16M")
    plan = cowhand("snapshot", "apply", "--dry-run", "--output", "json", path, "small").json()
    assert "the disk would have 8 MiB again" in plan["warnings"]
    cowhand("snapshot", "apply", path, "small")
    assert len(content(path)) == 8 * MiB


def test_a_raw_disk_has_none_and_the_way_out_is_told(image_dir: Path) -> None:
    image(image_dir / "raw", format="raw")
    done = cowhand("snapshot", "create", "-f", "raw", "raw", "one", cwd=image_dir, status=1)
    assert "cowhand create -f qcow2 -b raw -F raw OVERLAY" in done.stderr


def test_needs_a_name(path: Path) -> None:
    assert "needs a name" in cowhand("snapshot", "create", path, status=2).stderr
    cowhand("snapshot", "wrong", path, status=2)

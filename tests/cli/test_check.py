"""``cowhand check``: verdicts, exit codes, repairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image, snapshot_of
from tests.tools.qemu import assert_clean, qemu_img, require_qemu

CLUSTER = 65536


@pytest.fixture
def path(image_dir: Path) -> Path:
    """Return a sound image with some data."""
    image(image_dir / "a")
    fill(image_dir / "a", 0, MiB, 1)
    return image_dir / "a"


def refcount(path: Path, cluster: int, value: int) -> None:
    """Set the reference count of a cluster, counts being 16 bits wide and in the first block."""
    with open(path, "r+b") as file:
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        block = int.from_bytes(file.read(8), "big")
        file.seek(block + 2 * cluster)
        file.write(value.to_bytes(2, "big"))


def leak(path: Path) -> None:
    """Count a cluster behind the end of the image as used."""
    refcount(path, path.stat().st_size // CLUSTER, 1)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // CLUSTER * CLUSTER + CLUSTER)


def damage(path: Path) -> None:
    """Count the cluster of the last data as free."""
    refcount(path, path.stat().st_size // CLUSTER - 1, 0)


def test_a_sound_image(path: Path) -> None:
    before = snapshot_of(path.parent)
    lines = cowhand("check", path).stdout.splitlines()
    assert lines[0] == f"{path}: sound"
    assert lines[1].startswith("16 of 128 clusters in use (12.5 %); the image ends at ")
    document = cowhand("check", "--output", "json", path).json()
    assert (document["corruptions"], document["leaks"], document["check-errors"], document["findings"]) == (0, 0, 0, [])
    assert document["allocated-clusters"] == 16
    assert snapshot_of(path.parent) == before


@require_qemu
def test_lost_space(path: Path) -> None:
    data = content(path)
    leak(path)
    done = cowhand("check", path, status=7)
    assert "1 cluster lost, which harms no data" in done.stdout
    assert f"cowhand check -r leaks {path}" in done.stdout
    assert cowhand("check", "--output", "json", path, status=7).json()["leaks"] == 1
    assert qemu_img("check", path, check=False).status == 3
    assert "repaired: 0 damaged, 1 lost" in cowhand("check", "-r", "leaks", path).stdout
    assert_clean(path)
    assert content(path) == data


@require_qemu
def test_damage(path: Path) -> None:
    data = content(path)
    damage(path)
    done = cowhand("check", path, status=8)
    assert "damaged in" in done.stdout and "Copy the image, then" in done.stdout
    document = cowhand("check", "--output", "json", path, status=8).json()
    assert document["corruptions"] == qemu_img("check", "--output=json", path, check=False).json()["corruptions"]
    first = document["findings"][0]
    assert {"kind", "status", "text"} <= first.keys() and first["status"] == "error"
    assert all(finding["text"] in done.stdout for finding in document["findings"])
    assert "cowhand check -r all" in cowhand("check", "-r", "leaks", path, status=4).stderr
    assert cowhand("check", "-r", "all", "--output", "json", path).json()["corruptions-fixed"] >= 1
    assert_clean(path)
    assert content(path) == data


def test_dry_run_of_a_repair(path: Path) -> None:
    leak(path)
    before = snapshot_of(path.parent)
    plan = cowhand("check", "-r", "leaks", "--dry-run", "--output", "json", path, status=7).json()
    assert plan["writes"] == [{"path": str(path), "what": "reference counts", "bytes": None}]
    assert "would repair" in cowhand("check", "-r", "all", "--dry-run", path, status=7).stdout
    assert snapshot_of(path.parent) == before


def test_only_the_first_findings_are_shown(path: Path) -> None:
    count = path.stat().st_size // CLUSTER
    with open(path, "r+b") as file:
        file.truncate((count + 40) * CLUSTER)
    for cluster in range(count, count + 40):
        refcount(path, cluster, 1)
    done = cowhand("check", path, status=7)
    assert "and 20 more (--verbose prints them)" in done.stdout
    assert len(cowhand("check", "-v", path, status=7).stdout.splitlines()) > 40


def test_a_format_without_checks(image_dir: Path) -> None:
    image(image_dir / "raw", format="raw")
    assert "cannot be checked" in cowhand("check", "-f", "raw", "raw", cwd=image_dir, status=1).stderr


def test_what_is_no_image(image_dir: Path) -> None:
    (image_dir / "a").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(600))
    done = cowhand("check", "a", cwd=image_dir, status=4)
    assert "a" in done.stderr


def test_a_repair_is_planned_done_and_undone(path: Path) -> None:
    leak(path)
    before = path.read_bytes()
    plan = cowhand("check", "--plan", "-r", "leaks", "--output", "json", path).json()
    assert [row["what"] for row in plan["writes"]] == ["refcount block 0"]
    assert "refcount block 0" in cowhand("check", "--plan", path).stdout
    assert path.read_bytes() == before
    assert f"--undo {path}.undo" in cowhand("check", "-r", "leaks", path).stdout
    assert path.read_bytes() != before
    assert "undo the repair" in cowhand("check", "--undo", f"{path}.undo", "--dry-run", path).stdout
    assert cowhand("check", "--undo", f"{path}.undo", "--output", "json", path).json()["undone"] is True
    assert path.read_bytes() == before
    error = cowhand("check", "--undo", f"{path}.undo", "--output", "json", path, status=9).error()
    assert error["code"] == "undo-log-used" and error["path"] == f"{path}.undo"
    cowhand("check", "--undo", f"{path}.undo", "--force", "--dry-run", path, status=9)
    assert path.read_bytes() == before


def test_an_undo_that_was_used_is_refused_after_the_next_repair(path: Path) -> None:
    leak(path)
    before = path.read_bytes()
    cowhand("check", "-r", "leaks", path)
    cowhand("check", "--undo", f"{path}.undo", path)
    cowhand("check", "-r", "leaks", path)
    repaired = path.read_bytes()
    cowhand("check", "--undo", f"{path}.undo", path, status=9)
    assert path.read_bytes() == repaired
    cowhand("check", "--undo", f"{path}.undo.1", path)
    assert path.read_bytes() == before


def test_an_undo_over_what_was_written_since_is_refused(path: Path) -> None:
    leak(path)
    cowhand("check", "-r", "leaks", path)
    fill(path, 0, 65536, 7)
    written = path.read_bytes()
    assert "changed since" in cowhand("check", "--undo", f"{path}.undo", "--dry-run", path, status=9).stderr
    assert "changed since" in cowhand("check", "--undo", f"{path}.undo", path, status=9).stderr
    assert path.read_bytes() == written


def test_where_a_repair_is_advised_the_undo_log_is_named(path: Path) -> None:
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    data[block : block + 2] = b"\0\0"  # the header's own count
    path.write_bytes(data)
    log = f"cowhand check --undo {path}.undo {path}"
    assert log in cowhand("check", path, status=8).stdout
    assert log in cowhand("check", "-r", "all", "--dry-run", path, status=8).stdout
    assert cowhand("check", "-r", "all", "--dry-run", "--output", "json", path, status=8).json()["undo"].endswith(log)
    assert "copy the image first" in cowhand("check", "-r", "all", "--no-log", "--dry-run", path, status=8).stdout


def test_a_second_repair_takes_another_log_and_none_is_possible(path: Path) -> None:
    leak(path)
    (path.parent / "a.undo").write_text("mine")
    assert cowhand("check", "-r", "leaks", "--output", "json", path).json()["undo-log"] == f"{path}.undo.1"
    leak(path)
    assert "undo" not in cowhand("check", "-r", "leaks", "--no-log", path).stdout
    assert (path.parent / "a.undo").read_text() == "mine"
    assert "is not an undo log" in cowhand("check", "--undo", f"{path}.undo", path, status=4).stderr


def test_owners_of_lost_clusters(path: Path) -> None:
    leak(path)
    done = cowhand("check", "--explain", path, status=7)
    assert "nothing refers to it" in done.stdout
    owners = cowhand("check", "--explain", "--output", "json", path, status=7).json()["owners"]
    assert list(owners.values()) == [[]]

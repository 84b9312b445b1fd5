"""Several images in one call: all are dealt with, and the worst decides the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowhand.cli.several import Codes
from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image


@pytest.fixture
def folder(image_dir: Path) -> Path:
    for number, name in enumerate(("a", "b")):
        image(image_dir / name)
        fill(image_dir / name, 0, MiB, number + 1)
    return image_dir


@pytest.mark.parametrize("command", ["info", "check", "du", "checksum", "compact", "inspect"])
def test_what_is_wrong_with_one_is_told_and_the_others_follow(command: str, folder: Path) -> None:
    done = cowhand(command, "a", "gone", "b", cwd=folder, status=1)
    assert "gone" in done.stderr and "a" in done.stdout and done.stdout.index("b") > 0
    found = cowhand(command, "--output", "json", "a", "gone", "b", cwd=folder, status=1)
    assert [one["filename"] for one in found.json()] == ["a", "b"]
    assert found.error()["code"] == "not-found"
    assert len(cowhand(command, "--output", "json", "a", "b", cwd=folder).json()) == 2


def test_chains_of_several(folder: Path) -> None:
    image(folder / "top", backing=folder / "a")
    found = cowhand("info", "--chain", "--output", "json", "top", "b", cwd=folder).json()
    assert [[Path(one["filename"]).name for one in chain] for chain in found] == [["top", "a"], ["b"]]


def test_the_worst_counts() -> None:
    for given, worst in (((0, 7, 8, 0), 8), ((8, 1, 7), 1), ((7, 0), 7), ((4, 1), 4), ((), 0)):
        codes = Codes()
        for code in given:
            codes.add(code)
        assert codes.worst == worst


def test_snapshots_are_deleted_together_or_not_at_all(folder: Path) -> None:
    for name in ("one", "two", "three"):
        cowhand("snapshot", "create", "a", name, cwd=folder)
    before = (folder / "a").read_bytes()
    assert (
        "there is no snapshot 'gone'" in cowhand("snapshot", "delete", "a", "one", "gone", cwd=folder, status=1).stderr
    )
    assert (folder / "a").read_bytes() == before
    done = cowhand("snapshot", "delete", "a", "one", "1", "three", "--output", "json", cwd=folder).json()
    assert [one["snapshot"]["name"] for one in done] == ["one", "three"]
    left = cowhand("snapshot", "list", "a", "--output", "json", cwd=folder).json()
    assert [one["name"] for one in left] == ["two"]


def test_one_snapshot_of_several_images(folder: Path) -> None:
    was = content(folder / "a")
    cowhand("snapshot", "create", "--name", "now", "a", "b", cwd=folder)
    fill(folder / "a", 0, MiB, 9)
    cowhand("snapshot", "apply", "a", "b", "--name", "now", cwd=folder)
    assert content(folder / "a") == was
    assert "a:" in cowhand("snapshot", "list", "a", "b", cwd=folder).stdout
    cowhand("snapshot", "delete", "--name", "now", "a", "b", cwd=folder)
    assert cowhand("snapshot", "list", "a", "b", cwd=folder).stdout == "a has no snapshots\n\nb has no snapshots\n"
    assert "takes one snapshot" in cowhand("snapshot", "create", "a", "x", "y", cwd=folder, status=2).stderr

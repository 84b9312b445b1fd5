"""``cowhand du``."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command import cowhand
from tests.cli.images import MiB, fill, image


def test_the_parts_of_a_chain(image_dir: Path) -> None:
    image(image_dir / "a")
    fill(image_dir / "a", 0, MiB, 1)
    cowhand("create", "-f", "qcow2", "-b", "a", "-F", "qcow2", "top.qcow2", cwd=image_dir)
    found = cowhand("du", "--chain", "--output", "json", "top.qcow2", cwd=image_dir).json()
    assert [Path(one["filename"]).name for one in found] == ["top.qcow2", "a"]
    assert (found[0]["parts"]["data"], found[1]["parts"]["data"]) == (0, MiB)
    assert all(sum(one["parts"].values()) == one["file-size"] for one in found)
    lines = cowhand("du", "a", cwd=image_dir).stdout.splitlines()
    assert lines[0].startswith("a: qcow2, ") and lines[1].split() == ["for", "size", "share"]
    assert any(line.split()[:3] == ["data", "1", "MiB"] for line in lines)
    assert any(
        line.split()[:2] == ["data", str(MiB)] for line in cowhand("du", "--bytes", image_dir / "a").stdout.splitlines()
    )
    (image_dir / "a").unlink()
    gone = cowhand("du", "--chain", "--output", "json", "top.qcow2", cwd=image_dir, status=1).json()
    assert "problem" in gone[1]


def test_raw(image_dir: Path) -> None:
    path = image_dir / "r.raw"
    with path.open("wb") as file:
        file.truncate(8 * MiB)
        file.write(b"x" * MiB)
    (one,) = cowhand("du", "--output", "json", "-f", "raw", path).json()
    assert one["parts"] == {"data": MiB, "free": 7 * MiB} and one["format"] == "raw"

"""``cowhand rebase``: another backing file, the same content; --dry-run tells beforehand what will be copied."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image, snapshot_of


def test_says_beforehand_what_it_will_copy(image_dir: Path) -> None:
    base = image(image_dir / "base")
    middle = image(image_dir / "middle", backing=base)
    top = image(image_dir / "top", backing=middle)
    fill(base, 0, 3 * MiB, 1)
    fill(middle, MiB, 2 * MiB, 2)
    fill(top, 2 * MiB, MiB, 3)
    before, files = content(top), snapshot_of(image_dir)
    plan = cowhand("rebase", "--dry-run", "--output", "json", "-b", "base", "top", cwd=image_dir).json()
    assert plan["moves"] == MiB
    assert plan["undo"].startswith("cowhand rebase -b ") and " -F qcow2 top, while " in plan["undo"]
    assert snapshot_of(image_dir) == files
    done = cowhand("rebase", "--output", "json", "-b", "base", "top", cwd=image_dir).json()
    assert done == {
        "filename": "top",
        "backing-filename": "base",
        "backing-filename-format": "qcow2",
        "compared": MiB,
        "copied": MiB,
        "zeroes": 0,
    }
    assert content(top) == before
    assert "has no backing file any more" in cowhand("rebase", "-b", "", "top", cwd=image_dir).stdout
    base.unlink()
    assert content(top) == before


def test_unsafe_is_refused_when_others_stand_on_the_image(image_dir: Path) -> None:
    base = image(image_dir / "base")
    middle = image(image_dir / "middle", backing=base)
    image(image_dir / "top", backing=middle)
    before = middle.read_bytes()
    cowhand("rebase", "-u", "-b", "", "middle", cwd=image_dir, status=9)
    assert middle.read_bytes() == before
    cowhand("rebase", "-u", "--force", "-b", "", "middle", cwd=image_dir)
    assert "base" not in cowhand("info", "middle", cwd=image_dir).stdout

"""``cowhand compact``: plan, result, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import cowhand as library
from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image, snapshot_of


def test_planned_and_done(image_dir: Path) -> None:
    path = image(image_dir / "a")
    fill(path, 0, 6 * MiB, 1)
    with library.open(path, writable=True) as disk:
        disk.discard(0, 4 * MiB)
    data, before = content(path), snapshot_of(image_dir)
    plan = cowhand("compact", "--dry-run", "--output", "json", path).json()
    assert plan["moves"] == 2 * MiB
    assert snapshot_of(image_dir) == before
    done = cowhand("compact", "--output", "json", path).json()
    assert done["size-before"] - done["size"] == 4 * MiB
    assert path.stat().st_size == done["size"]
    assert content(path) == data
    assert "nothing to gain" in cowhand("compact", path).stdout
    assert "nothing was changed" in cowhand("compact", "--dry-run", path).stdout


def test_other_formats(image_dir: Path) -> None:
    image(image_dir / "raw", format="raw")
    assert "cannot be compacted" in cowhand("compact", "-f", "raw", "raw", cwd=image_dir, status=1).stderr

"""``cowhand flatten``: an image without backing files, by itself or beside."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowhand.image.info import image_info
from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image, snapshot_of


@pytest.fixture
def chain(image_dir: Path) -> Path:
    image(image_dir / "base")
    fill(image_dir / "base", 0, 2 * MiB, 1)
    image(image_dir / "middle", backing=image_dir / "base")
    fill(image_dir / "middle", MiB, 2 * MiB, 2)
    image(image_dir / "top", backing=image_dir / "middle")
    fill(image_dir / "top", 4 * MiB, MiB, 3)
    return image_dir


def test_in_place(chain: Path) -> None:
    before, below = content(chain / "top"), (chain / "middle").read_bytes()
    state = snapshot_of(chain)
    told = cowhand("flatten", "--dry-run", "top", cwd=chain).stdout
    assert "would make top independent of its backing file" in told and "3 MiB" in told
    assert snapshot_of(chain) == state
    assert cowhand("flatten", "top", cwd=chain).stdout == "top has no backing file any more; 3 MiB copied into it\n"
    assert (chain / "middle").read_bytes() == below
    (chain / "middle").unlink()
    assert content(chain / "top") == before and image_info(chain / "top").backing is None
    assert "nothing to do" in cowhand("flatten", "top", cwd=chain).stdout


def test_into_a_new_image(chain: Path) -> None:
    before, state = content(chain / "top"), snapshot_of(chain)
    cowhand("flatten", "top", "alone", "-c", "--verify", cwd=chain)
    assert {name: kept for name, kept in snapshot_of(chain).items() if Path(name).name != "alone"} == state
    assert content(chain / "alone") == before
    info = image_info(chain / "alone")
    assert (info.format, info.backing) == ("qcow2", None)
    assert "exists already" in cowhand("flatten", "top", "alone", cwd=chain, status=1).stderr
    assert "is an image that the source" in cowhand("flatten", "top", "base", "--overwrite", cwd=chain, status=1).stderr
    assert "for a new image" in cowhand("flatten", "top", "--verify", cwd=chain, status=2).stderr


def test_internal_snapshots_that_show_the_backing_file_are_guarded(chain: Path) -> None:
    cowhand("snapshot", "create", "top", "then", cwd=chain)
    before = snapshot_of(chain)
    assert "--force" in cowhand("flatten", "top", cwd=chain, status=9).stderr
    assert snapshot_of(chain) == before

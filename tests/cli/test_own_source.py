"""A copy over its own source, or over what the source reads through, is told as that, by whatever name it goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cowhand import CowhandError, convert
from tests.cli.command import cowhand
from tests.cli.images import MiB, fill, image, snapshot_of


@pytest.fixture
def folder(image_dir: Path) -> Path:
    image(image_dir / "base")
    fill(image_dir / "base", 0, MiB, 1)
    image(image_dir / "middle", backing=image_dir / "base")
    image(image_dir / "top", backing=image_dir / "middle")
    (image_dir / "soft").symlink_to("base")
    os.link(image_dir / "top", image_dir / "hard")
    return image_dir


@pytest.mark.parametrize("how", [(), ("--overwrite",), ("-n",), ("--dry-run",), ("--overwrite", "--force")])
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("top", "is the source itself"),
        ("hard", "is the source itself"),
        ("middle", "is an image that the source 'top' reads through"),
        ("base", "is an image that the source 'top' reads through"),
        ("soft", "is an image that the source 'top' reads through"),
    ],
)
def test_convert(how: tuple[str, ...], target: str, words: str, folder: Path) -> None:
    before = snapshot_of(folder)
    assert words in cowhand("convert", *how, "-O", "qcow2", "top", target, cwd=folder, status=1).stderr
    assert snapshot_of(folder) == before


def test_dd_and_the_library(folder: Path) -> None:
    before = snapshot_of(folder)
    assert "is the source itself" in cowhand("dd", "if=top", "of=hard", "--overwrite", cwd=folder, status=1).stderr
    for settings in ({"overwrite": True}, {"skip_create": True}, {"overwrite": True, "force": True}):
        with pytest.raises(CowhandError, match="reads through"):
            convert(folder / "top", folder / "soft", "qcow2", **settings)  # type: ignore[arg-type]
    assert snapshot_of(folder) == before

"""``cowhand resize``."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowhand.cli.commands.resize import new_size
from cowhand.core.errors import InvalidArgument
from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image, snapshot_of
from tests.tools.qemu import assert_clean, require_qemu


@require_qemu
def test_grows(image_dir: Path) -> None:
    path = image(image_dir / "a")
    fill(path, 0, 8 * MiB, 1)
    assert cowhand("resize", "a", "+2M", cwd=image_dir).stdout == "resized a from 8 MiB to 10 MiB\n"
    assert content(path) == b"\1" * (8 * MiB) + bytes(2 * MiB)
    assert_clean(path)
    assert cowhand("resize", "--output", "json", "a", "12M", cwd=image_dir).json() == {
        "filename": "a",
        "virtual-size": 12 * MiB,
        "previous-size": 10 * MiB,
    }
    assert "already" in cowhand("resize", "a", "12M", cwd=image_dir).stdout


def test_growth_over_a_longer_base_reads_as_zeroes(image_dir: Path) -> None:
    base = image(image_dir / "base")
    fill(base, 0, 8 * MiB, 1)
    cowhand("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "work", "4M", cwd=image_dir)
    cowhand("resize", "work", "8M", cwd=image_dir)
    assert content(image_dir / "work") == b"\1" * (4 * MiB) + bytes(4 * MiB)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_shrinking_has_to_be_insisted_on(image_dir: Path, format: str) -> None:
    path = image(image_dir / "a", format=format)
    before = snapshot_of(image_dir)
    done = cowhand("resize", "-f", format, "a", "-4M", cwd=image_dir, status=1)
    assert "the last 4 MiB of the disk would be lost" in done.stderr and "--shrink" in done.stderr
    assert snapshot_of(image_dir) == before
    assert path.exists()


def test_shrinking_a_raw_disk(image_dir: Path) -> None:
    image(image_dir / "a", format="raw")
    cowhand("resize", "-f", "raw", "--shrink", "a", "1M", cwd=image_dir)
    assert (image_dir / "a").stat().st_size == MiB


def test_the_base_of_others_is_not_cut(image_dir: Path) -> None:
    base = image(image_dir / "base")
    image(image_dir / "work", backing=base)
    assert "work" in cowhand("resize", "--shrink", "base", "1M", cwd=image_dir, status=9).stderr


def test_plans(image_dir: Path) -> None:
    image(image_dir / "a")
    before = snapshot_of(image_dir)
    plan = cowhand("resize", "--dry-run", "--output", "json", "a", "1M", cwd=image_dir).json()
    assert plan["warnings"] == ["the last 7 MiB of the disk would be lost"]
    assert cowhand("resize", "--dry-run", "a", "10M", cwd=image_dir).stdout.endswith(
        "cowhand resize --shrink a 8388608\n"
    )
    assert snapshot_of(image_dir) == before


@pytest.mark.parametrize(
    ("text", "old", "size"),
    [("10k", 0, 10240), ("+1k", 1024, 2048), ("-1k", 4096, 3072), ("513", 0, 1024), ("1.5k", 0, 1536)],
)
def test_sizes(text: str, old: int, size: int) -> None:
    assert new_size(text, old) == size


@pytest.mark.parametrize("text", ["+0", "-0", "x", "-2k", "", "+", "1e3"])
def test_sizes_that_mean_nothing(text: str) -> None:
    with pytest.raises(InvalidArgument):
        new_size(text, 1024)


@pytest.mark.parametrize(
    "words",
    [("a", "-1M", "--shrink"), ("-1M", "--shrink", "a"), ("--shrink", "a", "--", "-1M"), ("--shrink", "-1M", "a")],
)
def test_a_size_that_looks_like_an_option(words: tuple[str, ...], image_dir: Path) -> None:
    image(image_dir / "a")
    assert cowhand("resize", *words, cwd=image_dir).stdout == "resized a from 8 MiB to 7 MiB\n"

"""dd: what qemu-img dd copies."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowhand.copy.ops.dd import dd
from cowhand.core.errors import ImageExists, InvalidArgument
from tests.copy.images import content, sparse_file
from tests.tools.qemu import assert_identical, qemu_img, require_qemu

SIZE = 20_000


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("block", [1, 512, 700, 65536, 1 << 20])
@pytest.mark.parametrize(
    ("count", "skip"), [(None, 0), (3, 0), (3, 1), (None, 2), (0, 0), (2, 2), (1000, 5), (None, 1 << 40)]
)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_it_copies_what_qemu_copies(
    image_dir: Path, rng: random.Random, block: int, count: int | None, skip: int, format: str
) -> None:
    raw = sparse_file(image_dir / "raw", content(rng, SIZE // 512 * 512))
    ours, theirs = image_dir / "ours", image_dir / "theirs"
    warnings: list[str] = []
    dd(raw, ours, format, source_format="raw", block_size=block, count=count, skip=skip, warn=warnings.append)
    words = [f"bs={block}", f"skip={skip}", *([] if count is None else [f"count={count}"])]
    answer = qemu_img("dd", "-f", "raw", "-O", format, *words, f"if={raw}", f"of={theirs}")
    if format == "raw":
        assert ours.read_bytes() == theirs.read_bytes()
    else:
        assert_identical(ours, format, theirs, format)
    assert [f"qemu-img: {line}" for line in warnings] == answer.stderr.splitlines()


def test_blocks_have_a_size(image_dir: Path) -> None:
    source = image_dir / "raw"
    source.write_bytes(bytes(1024))
    for size in (0, 1 << 31):
        with pytest.raises(InvalidArgument, match=r"Invalid bs specified. Must be between 1 and 2147483647."):
            dd(source, image_dir / "x", block_size=size, source_format="raw")
    assert not (image_dir / "x").exists()


def test_an_existing_file_is_left_alone(image_dir: Path) -> None:
    source, target = image_dir / "raw", image_dir / "x"
    source.write_bytes(bytes(1024))
    target.write_bytes(b"precious")
    with pytest.raises(ImageExists):
        dd(source, target, source_format="raw")
    assert target.read_bytes() == b"precious"
    dd(source, target, source_format="raw", overwrite=True)
    assert target.read_bytes() == bytes(1024)

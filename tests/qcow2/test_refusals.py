"""Headers and options that are refused, with the words of QEMU's tools."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.core.errors import Closed, CowhandError, InvalidArgument
from cowhand.image import bitmaps
from cowhand.image.create import prepare
from tests.qcow2 import images
from tests.qcow2.images import Shape


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    prepare(str(path), "qcow2", "1M", {}).run()
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_disk_that_no_first_level_table_could_map_is_too_big(image: Path) -> None:
    patch(image, 24, (1 << 60).to_bytes(8, "big"))
    with pytest.raises(CowhandError) as caught:
        cowhand.open(image)
    assert caught.value.qemu().endswith("Image is too big")


def test_name_of_a_feature_that_the_extension_cuts_off_is_read(image: Path) -> None:
    patch(image, 72, (1 << 63).to_bytes(8, "big"))
    # In place of the table of known names: one name without its padding, and the end of the extensions.
    patch(image, 112, bytes.fromhex("6803f857 0000000e 003f") + b"Test feature" + bytes(2) + bytes(8))
    with pytest.raises(CowhandError, match=r"feature\(s\): Test feature "):
        cowhand.open(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cache-size": 1 << 20, "l2-cache-size": 1 << 19, "refcount-cache-size": 1 << 19},
            "may not be set at the same time",
        ),
        ({"cache-size": 1 << 20, "l2-cache-size": 2 << 20}, "l2-cache-size may not exceed cache-size"),
        ({"cache-size": 1 << 20, "refcount-cache-size": 2 << 20}, "refcount-cache-size may not exceed cache-size"),
        ({"l2-cache-entry-size": 33000}, r"between 512 and the cluster size \(65536\)"),
        ({"l2-cache-entry-size": 256}, "must be a power of two"),
        ({"l2-cache-entry-size": 131072}, "must be a power of two"),
    ],
)
def test_cache_sizes_that_contradict_one_another(image: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        cowhand.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}, **options})


@pytest.mark.parametrize("options", [{"cache-size": 1 << 20, "l2-cache-size": 1 << 20}, {"l2-cache-entry-size": 4096}])
def test_cache_sizes_that_go_together(image: Path, options: dict[str, int]) -> None:
    with cowhand.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}, **options}) as disk:
        assert disk.read(0, 512) == bytes(512)


def test_a_closed_disk_is_not_changed() -> None:
    """By what is no request, either: its tables are written no more."""
    node = images.create(Shape(), b"x" * 9000)
    keeper = Disk(node)
    disk = images.open_over(node, writable=True)
    images.snapshot_create(disk, "a")
    disk.close()
    before = node.snapshot_bytes()
    for change in (
        lambda: disk.resize(1 << 20),
        lambda: images.snapshot_create(disk, "b"),
        lambda: images.snapshot_apply(disk, "a"),
        lambda: images.snapshot_delete(disk, "a"),
        lambda: images.snapshot_read(disk, "a"),
        lambda: bitmaps.add_bitmap(disk, "b"),
    ):
        with pytest.raises(Closed):
            change()
    assert node.snapshot_bytes() == before
    keeper.close()

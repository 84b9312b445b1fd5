"""What the system uses is not written without --force: mounts, loop devices and the files they show."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowhand as library
from cowhand.block.locking import device_use
from tests.cli.command import cowhand
from tests.cli.images import MiB, image


@pytest.fixture
def loop(image_dir: Path) -> Iterator[tuple[Path, str]]:
    """Return a raw file and the loop device that shows it."""
    file = image_dir / "disk.img"
    file.write_bytes(bytes(8 * MiB))
    if os.geteuid() or subprocess.run(["losetup", "-f"], capture_output=True, check=False).returncode:
        pytest.skip("loop devices need root")
    device = subprocess.run(
        ["losetup", "-f", "--show", file], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not device:
        pytest.skip("there is no free loop device")
    yield file, device
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.fixture
def mounted(loop: tuple[Path, str], tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Return the same with a mounted file system."""
    _, device = loop
    where = tmp_path / "a folder"
    where.mkdir()
    if subprocess.run(["mkfs.ext2", "-q", device], capture_output=True, check=False).returncode:
        pytest.skip("there is no mkfs.ext2")
    if subprocess.run(["mount", device, where], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield loop
    subprocess.run(["umount", where], check=True)


def test_a_mounted_device_is_not_written(mounted: tuple[Path, str], image_dir: Path) -> None:
    file, device = mounted
    before = file.read_bytes()
    image(image_dir / "small.qcow2")
    for words in (
        ("convert", "-n", "small.qcow2", device),
        ("convert", "--overwrite", "small.qcow2", device),
        ("create", "--overwrite", "-f", "qcow2", device, "1M"),
        ("dd", "--overwrite", "if=small.qcow2", f"of={device}"),
    ):
        done = cowhand(*words, cwd=image_dir, status=5)
        assert f"'{device}' is in use: it is mounted on " in done.stderr and "a folder" in done.stderr
        assert "--force" in done.stderr
    told = cowhand("convert", "-n", "--dry-run", "small.qcow2", device, cwd=image_dir)
    assert "is not written without --force" in told.stderr
    with pytest.raises(library.errors.ImageInUse):
        library.open(device, writable=True, format="raw")
    assert cowhand("info", "-f", "raw", device).stdout
    assert file.read_bytes() == before


def test_the_file_of_a_loop_device_is_not_written(loop: tuple[Path, str], image_dir: Path) -> None:
    file, device = loop
    for words in (("resize", "disk.img", "+1M"), ("create", "--overwrite", "disk.img", "1M")):
        assert f"it is what {device} shows" in cowhand(*words, cwd=image_dir, status=5).stderr
    assert file.stat().st_size == 8 * MiB
    cowhand("resize", "--force", "disk.img", "+1M", cwd=image_dir)
    assert file.stat().st_size == 9 * MiB


def test_a_device_that_nothing_uses_is_written(loop: tuple[Path, str], image_dir: Path) -> None:
    file, device = loop
    cowhand("create", "--overwrite", "-f", "qcow2", device, "1M", cwd=image_dir)
    assert file.read_bytes()[:4] == b"QFI\xfb"
    image(image_dir / "other", 8 * MiB)
    assert "it lies on" in cowhand("convert", "-n", "-O", "raw", "disk.img", device, cwd=image_dir, status=1).stderr


def test_the_device_of_the_root_file_system_is_in_use() -> None:
    root = os.stat("/").st_dev
    device = Path(f"/dev/block/{os.major(root)}:{os.minor(root)}")
    if not device.exists():
        pytest.skip("the root file system is on no block device")
    assert any("is mounted on /" in words for words in device_use.uses(str(device)))


def test_nothing_is_asked_outside_of_the_command(loop: tuple[Path, str]) -> None:
    file, _ = loop
    device_use.check(str(file))
    with device_use.refused():
        with pytest.raises(library.errors.ImageInUse):
            device_use.check(str(file))
        with device_use.allowed():
            device_use.check(str(file))

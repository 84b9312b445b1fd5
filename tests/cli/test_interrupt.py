"""Ctrl-C in the middle of a command: exit code, no half-made target, sources untouched, overlays that read as before."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest

from cowhand.image.check import check
from tests.cli.command import start
from tests.cli.images import MiB, content, fill, image, snapshot_of
from tests.tools.patience import PATIENCE

SIZE = 24 * MiB


@pytest.fixture
def folder(image_dir: Path, rng: random.Random) -> Path:
    """Return a folder with base ← work and a raw disk."""
    base = image(image_dir / "base.qcow2", SIZE)
    work = image(image_dir / "work.qcow2", backing=base)
    fill(base, 0, 4 * MiB, 1)
    fill(work, MiB, 20 * MiB, 2)
    (image_dir / "disk.raw").write_bytes(rng.randbytes(SIZE))
    return image_dir


def interrupted(folder: Path, *arguments: str, number: int = signal.SIGINT) -> subprocess.CompletedProcess[str]:
    """Run a command that takes some seconds, and interrupt it when its first progress is told."""
    with start(*arguments, "-p", cwd=folder) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert "%" in first, first
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err
    return subprocess.CompletedProcess(arguments, process.returncode, out, first + err)


COPIES = {
    "convert": ("convert", "-r", "4M", "disk.raw", "new.qcow2"),
    "convert compressed": ("convert", "-c", "-r", "4M", "disk.raw", "new.qcow2"),
    "convert to raw": ("convert", "-r", "4M", "work.qcow2", "new.raw"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_leaves_nothing_behind(name: str, folder: Path) -> None:
    before = snapshot_of(folder)
    done = interrupted(folder, *COPIES[name])
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].endswith(": interrupted")
    assert snapshot_of(folder) == before


def test_sigterm_is_told_apart(folder: Path) -> None:
    before = snapshot_of(folder)
    assert interrupted(folder, *COPIES["convert"], number=signal.SIGTERM).returncode == 143
    assert snapshot_of(folder) == before


def test_a_commit_leaves_an_overlay_that_reads_as_before(folder: Path) -> None:
    before = content(folder / "work.qcow2")
    assert interrupted(folder, "commit", "-r", "4M", "work.qcow2").returncode == 130
    assert content(folder / "work.qcow2") == before
    for name in ("work.qcow2", "base.qcow2"):
        assert check(folder / name).clean
    with start("commit", "work.qcow2", cwd=folder) as process:
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert content(folder / "base.qcow2") == before


def test_writing_into_an_existing_image_leaves_it_whole_and_the_source_untouched(folder: Path) -> None:
    target = image(folder / "target.qcow2", SIZE)
    source = (folder / "disk.raw").read_bytes()
    assert interrupted(folder, "convert", "-n", "-r", "4M", "disk.raw", "target.qcow2").returncode == 130
    assert check(target).clean
    assert (folder / "disk.raw").read_bytes() == source

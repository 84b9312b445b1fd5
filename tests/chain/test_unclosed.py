"""Disks of the library that nobody closes: flushed, reported, and not locked any more."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import cowhand
from tests.cli.command import surroundings


def test_at_the_end_of_the_process(tmp_path: Path) -> None:
    code = """
import sys, cowhand
cowhand.create(sys.argv[1], "qcow2", "10G")
disk = cowhand.open(sys.argv[1], writable=True)
disk.write(5 << 30, b"kept")
"""
    path = tmp_path / "a.qcow2"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, path],
        capture_output=True,
        text=True,
        env=surroundings(),
        check=True,
    )
    assert "ResourceWarning" in done.stderr and "a.qcow2" in done.stderr
    with cowhand.open(path) as disk:
        assert disk.read(5 << 30, 4) == b"kept"
    assert cowhand.check(path).clean


def test_a_disk_that_nothing_refers_to_does_not_stay_locked(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    cowhand.create(path, "qcow2", "1M")
    disk = cowhand.open(path, writable=True)
    disk.write(0, b"kept")
    with pytest.raises(cowhand.errors.ImageInUse):
        cowhand.open(path, writable=True)
    del disk
    with cowhand.open(path, writable=True) as again:
        assert again.read(0, 4) == b"kept"


def test_it_warns(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    cowhand.create(path, "raw", "1M")
    disks = [cowhand.open(path)]
    with pytest.warns(ResourceWarning, match="opened for reading and never closed"):
        disks.clear() or gc.collect()

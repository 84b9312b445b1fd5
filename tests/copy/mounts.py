"""Small file systems for tests: made in a file, mounted for the length of a ``with`` block. Needs root and the file system's tools."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tools.programs import run

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to mount file systems"
)


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system in memory that holds *size* bytes."""
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@contextmanager
def loop(folder: Path, kind: str, size: int) -> Iterator[Path]:
    """Make a file system of *kind* in a file, and mount it on *folder*."""
    image = folder.with_suffix(".image")
    with open(image, "wb") as file:
        file.truncate(size)
    run(f"mkfs.{kind}", image)
    folder.mkdir()
    mounted = run("mount", "-o", "loop", image, folder, check=False)
    if mounted.status:
        pytest.skip(f"cannot mount {kind}: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        run("umount", folder)
        image.unlink()

"""Images for the command's tests, made with the library, and their content."""

from __future__ import annotations

import os
from pathlib import Path

import cowhand
from cowhand.image.create import create

MiB = 1 << 20


def image(path: Path, size: int = 8 * MiB, *, format: str = "qcow2", backing: Path | None = None) -> Path:
    """Make an image; over *backing* where one is given, named as relative to the image."""
    if backing is None:
        create(path, format, size)
    else:
        create(path, format, backing=os.path.relpath(backing, path.parent), backing_format="qcow2")
    return path


def fill(path: Path, offset: int, length: int, value: int) -> None:
    """Write *length* bytes of *value*."""
    with cowhand.open(path, writable=True) as disk:
        disk.write(offset, bytes([value]) * length)


def content(path: Path, format: str | None = None) -> bytes:
    """Return all bytes of the disk."""
    with cowhand.open(path, format=format) as disk:
        return disk.read(0, disk.size)


def snapshot_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, to see that a command changed none."""
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}

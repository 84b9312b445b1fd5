"""What is measured on: disks filled with real files, so that compression and zero detection meet what they meet in practice."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from measuring import program, spawn

MIB = 1 << 20
#: Data and holes alternate in stretches of this size in a sparse disk.
STRETCH = 16 * MIB
_FOLDERS = ("/usr/share", "/usr/lib", "/usr/bin", "/usr/include")


def real_bytes() -> Iterator[bytes]:
    """Yield pieces of real files for ever, in the same order each time; random bytes where there are no files."""
    files = [path for folder in _FOLDERS for path in _files(folder)]
    random.Random(1).shuffle(files)
    while True:
        found = False
        for path in files:
            try:
                with open(path, "rb") as file:
                    while piece := file.read(4 * MIB):
                        found = True
                        yield piece
            except OSError:
                continue
        if not found:
            yield random.Random(2).randbytes(MIB)


def _files(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(root, name)
            if not os.path.islink(path):
                yield path


class Inputs:
    """Makes each input once, when it is first asked for, below *folder*. *data* bytes of content in disks of twice the size."""

    def __init__(self, folder: Path, data: int, mapped: str) -> None:
        self.folder = folder
        self.data = data
        self.mapped_size = mapped
        self.qemu_img = program("qemu-img")

    def path(self, name: str) -> Path:
        """Return the path of an input or of a result."""
        return self.folder / name

    def sparse_raw(self) -> Path:
        """Data in half of the disk, holes in the other."""
        return self._raw("sparse.raw", full=False)

    def full_raw(self) -> Path:
        """The same content with every byte written: the zeroes have to be found."""
        return self._raw("full.raw", full=True)

    def _raw(self, name: str, *, full: bool) -> Path:
        path = self.path(name)
        if path.exists():
            return path
        content = real_bytes()
        left = b""
        with open(path, "wb") as file:
            for offset in range(0, 2 * self.data, 2 * STRETCH):
                file.seek(offset)
                missing = STRETCH
                while missing:
                    left = left or next(content)
                    piece, left = left[:missing], left[missing:]
                    file.write(piece)
                    missing -= len(piece)
                if full:
                    file.write(bytes(STRETCH))
            file.truncate(2 * self.data)
            file.flush()
            os.fsync(file.fileno())
        return path

    def qcow2(self, name: str = "plain.qcow2", *options: str) -> Path:
        """Return the sparse disk as qemu-img converts it with *options*."""
        path = self.path(name)
        if not path.exists():
            spawn(self.qemu_img, "convert", "-f", "raw", "-O", "qcow2", *options, self.sparse_raw(), path)
        return path

    def mapped(self) -> Path:
        """A disk, 1 TiB by default, whose every cluster is mapped; its data are a hole of the file."""
        path = self.path("mapped.qcow2")
        if not path.exists():
            options = ("-o", "preallocation=metadata")
            spawn(self.qemu_img, "create", "-q", "-f", "qcow2", *options, path, self.mapped_size)
        return path

    def small(self) -> Path:
        """An image as `info` mostly meets it."""
        path = self.path("small.qcow2")
        if not path.exists():
            spawn(self.qemu_img, "create", "-q", "-f", "qcow2", path, "10G")
        return path

    def filled(self, size: int, *options: str) -> Path:
        """A qcow2 image of *size* bytes with every cluster written, for random requests; made with *options* of qemu-img's."""
        path = self.path(f"filled-{size}{'-'.join(options)}.qcow2")
        if not path.exists():
            raw = self.path("filled.raw")
            block = random.Random(3).randbytes(MIB)
            with open(raw, "wb") as file:
                for _ in range(size // MIB):
                    file.write(block)
            spawn(self.qemu_img, "convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
            raw.unlink()
        return path

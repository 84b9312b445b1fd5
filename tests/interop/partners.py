"""The two programs that may hold an image: cowhand in this process, and QEMU's tools. Both do the same requests."""

from __future__ import annotations

import contextlib
import io
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import cowhand
from cowhand.block.disk import Disk
from cowhand.cli.compat.img import check as compat_check, map as compat_map
from cowhand.image import snapshots
from cowhand.image.create import create
from tests.interop.images import PATTERN_SIZE, Shape, pattern
from tests.tools.qemu import qemu_img, qemu_io


class Partner(ABC):
    """Does requests to the image at ``path``; between :meth:`begin` and :meth:`end` it may keep it open."""

    name: str

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path = path
        self.shape = shape

    @abstractmethod
    def begin(self, discard: str) -> None:
        """Start a session; *discard* is "unmap" or "ignore"."""

    @abstractmethod
    def end(self) -> None:
        """End it: the file is complete."""

    @abstractmethod
    def write(self, offset: int, seed: int, length: int) -> None:
        """Write the pattern of *seed*."""

    @abstractmethod
    def compress(self, offset: int, seed: int, length: int) -> None:
        """Write the pattern compressed to the one cluster at *offset*; *length* is less only at the disk's end."""

    @abstractmethod
    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """Write zeroes."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """Discard."""

    @abstractmethod
    def flush(self) -> None:
        """Flush."""

    @abstractmethod
    def resize(self, size: int) -> None:
        """Grow."""

    @abstractmethod
    def snapshot(self, verb: str, name: str) -> None:
        """Create, apply or delete an internal snapshot."""

    @abstractmethod
    def content(self, snapshot: str | None = None) -> bytes:
        """Return the guest's bytes of the closed image, or of one of its snapshots."""

    @abstractmethod
    def map(self) -> str:
        """Return what ``map --output=json`` prints of the closed image."""

    @abstractmethod
    def check(self) -> dict[str, Any]:
        """Return the exit status and the JSON of ``check``."""


class Cowhand(Partner):
    """This process."""

    name = "cowhand"
    disk: Disk

    @staticmethod
    def create(path: Path, shape: Shape, backing: Path | None) -> None:
        name = backing.name if backing is not None else None
        create(
            path,
            "qcow2",
            shape.sizes[0],
            shape.options(path),
            backing=name,
            backing_format=shape.formats[0] if name else None,
        )

    def begin(self, discard: str) -> None:
        self.disk = cowhand.open(self.path, format="qcow2", writable=True, options={"discard": discard})

    def end(self) -> None:
        self.disk.close()

    def write(self, offset: int, seed: int, length: int) -> None:
        data = pattern(seed, length)
        if seed % 4:
            self.disk.write(offset, data)
        else:
            cut = length // 3
            self.disk.submit([(1, offset, data[:cut]), (1, offset + cut, data[cut:])])

    def compress(self, offset: int, seed: int, length: int) -> None:
        node: Any = self.disk.root
        payload = node.codec.compress(pattern(seed, length).ljust(self.shape.cluster, b"\0"))
        if payload is None:  # does not become smaller
            self.disk.write(offset, pattern(seed, length))
        else:
            node.write_compressed(offset, payload)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self.disk.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self.disk.discard(offset, length)

    def flush(self) -> None:
        self.disk.flush()

    def resize(self, size: int) -> None:
        self.disk.resize(size)

    def snapshot(self, verb: str, name: str) -> None:
        if verb == "create":
            snapshots.create_snapshot(self.disk, name)
        elif verb == "apply":
            snapshots.apply_snapshot(self.disk, name)
        else:
            snapshots.delete_snapshot(self.disk, name)

    def content(self, snapshot: str | None = None) -> bytes:
        with cowhand.open(self.path, format="qcow2") as disk:
            if snapshot is None:
                return disk.read(0, disk.size)
            with snapshots.open_snapshot(disk, snapshot) as view:
                return view.read(0, view.size)

    def map(self) -> str:
        return _printed(compat_map, "map", self.path)[1]

    def check(self) -> dict[str, Any]:
        status, text = _printed(compat_check, "check", self.path)
        return {"status": status, **json.loads(text)}


def _printed(command: Any, verb: str, path: Path) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = command.run([verb, "--output=json", "-f", "qcow2", str(path)])
    return status, out.getvalue()


class Qemu(Partner):
    """qemu-img and qemu-io. Requests are collected and done by one qemu-io, up to what only qemu-img can do."""

    name = "qemu"

    def __init__(self, path: Path, shape: Shape) -> None:
        super().__init__(path, shape)
        self.commands: list[str] = []
        self.mode = "ignore"

    @staticmethod
    def create(path: Path, shape: Shape, backing: Path | None) -> None:
        options = ",".join(f"{name}={value}" for name, value in shape.options(path).items())
        below = ("-b", backing.name, "-F", shape.formats[0]) if backing is not None else ()
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, *below, path, str(shape.sizes[0]))

    def begin(self, discard: str) -> None:
        self.mode = discard

    def end(self) -> None:
        self._do()

    def _do(self) -> None:
        if self.commands:
            qemu_io(self.path, *self.commands, format="qcow2", options=("-d", self.mode))
            self.commands.clear()

    def _pattern_file(self, seed: int) -> Path:
        path = self.path.parent / f"pattern{seed}"
        if not path.exists():
            path.write_bytes(pattern(seed, PATTERN_SIZE))
        return path

    def write(self, offset: int, seed: int, length: int) -> None:
        self.commands.append(f"write -q -s {self._pattern_file(seed)} {offset} {length}")

    def compress(self, offset: int, seed: int, length: int) -> None:
        self.commands.append(f"write -q -c -s {self._pattern_file(seed)} {offset} {length}")

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self.commands.append(f"write -q -z {'-u ' if unmap else ''}{offset} {length}")

    def discard(self, offset: int, length: int) -> None:
        self.commands.append(f"discard -q {offset} {length}")

    def flush(self) -> None:
        self.commands.append("flush")

    def resize(self, size: int) -> None:
        self._do()
        qemu_img("resize", "-q", "-f", "qcow2", self.path, str(size))

    def snapshot(self, verb: str, name: str) -> None:
        self._do()
        qemu_img("snapshot", "-q", {"create": "-c", "apply": "-a", "delete": "-d"}[verb], name, self.path)

    def content(self, snapshot: str | None = None) -> bytes:
        raw = self.path.parent / "content.raw"
        chosen = ("-l", f"snapshot.name={snapshot}") if snapshot is not None else ()
        qemu_img("convert", "-f", "qcow2", *chosen, "-O", "raw", self.path, raw)
        found = raw.read_bytes()
        raw.unlink()
        return found

    def map(self) -> str:
        return qemu_img("map", "--output=json", "-f", "qcow2", self.path).stdout

    def check(self) -> dict[str, Any]:
        result = qemu_img("check", "--output=json", "-f", "qcow2", self.path, check=False)
        report: dict[str, Any] = result.json()
        return {"status": result.status, **report}

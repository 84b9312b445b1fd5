"""The contracts of formats that QEMU reads and writes as well: it makes the images, and reads them around the driver."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.core.extents import ALLOCATED, DATA, OFFSET, ZERO
from cowhand.drivers import REGISTRY
from cowhand.testing.formats import FormatContract
from cowhand.testing.mapped import MappedContract
from tests.tools.qemu import assert_identical, qemu_img, qemu_map

KIB, MIB = 1 << 10, 1 << 20


def make(folder: Path, content: bytes, driver: str, options: str = "", extra: tuple[str, ...] = ()) -> Path:
    """Have qemu-img make an image of *content*."""
    raw, image = folder / "content.raw", folder / f"disk.{driver}"
    raw.write_bytes(content)
    chosen = ("-o", options) if options else ()
    # qemu-img 7.2 fails without a word when it has made a compressed qcow image.
    qemu_img("convert", "-f", "raw", "-O", driver, *chosen, *extra, raw, image, check="-c" not in extra)
    if extra:
        assert_identical(image, driver, raw, "raw")
    return image


class QemuReads(MappedContract):
    """Reading what qemu-img makes, in the way of ``options``."""

    options: ClassVar[str] = ""
    extra: ClassVar[tuple[str, ...]] = ()

    def make_image(self, folder: Path, content: bytes) -> Path:
        return make(folder, content, self.driver, self.options, self.extra)

    def test_the_map_is_that_of_qemu(self, tmp_path: Path) -> None:
        image = self.make_image(tmp_path, self.content())
        with cowhand.open(image, format=self.driver) as disk:
            assert rows_of(disk) == qemu_map(image, self.driver)


def rows_of(disk: Disk) -> list[dict[str, Any]]:
    """Return what ``qemu-img map --output json`` says of *disk*."""
    rows: list[dict[str, Any]] = []
    for batch in disk.extents():
        for row in batch:
            found: dict[str, Any] = {
                "start": row.start, "length": row.length, "depth": row.depth, "present": bool(row.flags & ALLOCATED),
                "zero": bool(row.flags & ZERO), "data": bool(row.flags & DATA),
            }  # fmt: skip
            if row.flags & OFFSET:
                found["offset"] = row.host
            last = rows[-1] if rows else {}
            alike = all(found[key] == last.get(key) for key in ("depth", "present", "zero", "data"))
            if alike and ("offset" in found) == ("offset" in last) and (
                "offset" not in found or last["offset"] + last["length"] == found["offset"]
            ):  # fmt: skip
                last["length"] += row.length
            else:
                rows.append(found)
    return rows


class QemuWrites(FormatContract):
    """Writing what qemu-img has made, read by qemu-img."""

    driver: ClassVar[str]
    options: ClassVar[str] = ""

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        make(folder, content, self.driver, self.options)
        return self.open_again(folder, writable)

    def open_again(self, folder: Path, writable: bool = True, backing: BlockNode | None = None) -> BlockNode:
        what: dict[str, Any] = {"driver": self.driver, "file.filename": str(folder / f"disk.{self.driver}")}
        what |= {"read-only": not writable, "discard": "unmap"}
        if backing is not None:
            what["backing"] = backing
        return Opening(REGISTRY).open(what)

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        out = folder / "out.raw"
        image = folder / f"disk.{self.driver}"
        qemu_img("convert", "-U", "-f", self.driver, "-O", "raw", image, out)
        return out.read_bytes()

    def check_image(self, folder: Path) -> None:
        image = folder / f"disk.{self.driver}"
        if image.exists():
            result = qemu_img("check", "-f", self.driver, image, check=False)
            assert result.status in (0, 3, 63), result.stdout + result.stderr


def round_trip(folder: Path, size: int, driver: str, options: str = "") -> None:
    """Convert a sparse disk of *size* bytes to *driver* and back, with cowhand and with qemu-img, and compare."""
    raw = folder / "source.raw"
    with raw.open("wb") as file:
        file.truncate(size)
        for offset in (0, 70_000, size // 2, size - 512):
            file.seek(max(0, min(offset, size - 512)))
            file.write(b"\xa5mark" * 100 + bytes(12))
    ours, theirs, back = folder / f"ours.{driver}", folder / f"theirs.{driver}", folder / "back.raw"
    settings = dict(pair.split("=") for pair in options.split(",")) if options else {}
    cowhand.convert(raw, ours, driver, source_format="raw", options=settings)
    assert_identical(raw, "raw", ours, driver)
    result = qemu_img("check", "-f", driver, ours, check=False)
    assert result.status in (0, 63), result.stdout + result.stderr
    qemu_img("convert", "-f", "raw", "-O", driver, *(("-o", options) if options else ()), raw, theirs)
    cowhand.convert(theirs, back, "raw", source_format=driver)
    assert_identical(raw, "raw", back, "raw")
    shutil.rmtree(folder, ignore_errors=True)


def close(node: BlockNode) -> None:
    """Close *node*."""
    graph.close_node(node)

"""Drawn images that were cut off at any length, and a model of what can still be read of them.

Source: QEMU ``docs/interop/qcow2``. The model reads the whole file's tables by itself, shares no code with the driver, and says of each stretch of a
disk that it is as drawn, that it ends with the file (its last cluster may be short, and reads on as zeroes), or that it is lost.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

import cowhand
from cowhand.core.errors import CowhandError
from cowhand.image import snapshots
from tests.foreign.images import Image

#: Images that are refused whole or cut.
REFUSED = {"unknown", "backing format"}
_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62


class Stretch(NamedTuple):
    """Guest bytes ``[begin, end)``. ``there``: how many of them are as drawn, the others reading as zeroes; -1 lost, None lost or as drawn."""

    begin: int
    end: int
    there: int | None


class Cut:
    """*image*, of which the file *name* was cut to *length* bytes."""

    def __init__(self, image: Image, name: str, length: int) -> None:
        self.image = image
        folder = image.path.parent
        self.data = image.path.read_bytes()
        whole = (folder / name).read_bytes()
        self.name, self.length = name, length
        self.end = length if name == image.path.name else len(self.data)
        self.data_end = self.end
        if image.shape.external:
            self.data_end = length if name != image.path.name else (folder / "disk.data").stat().st_size
        (folder / name).write_bytes(whole[:length])

    @property
    def header(self) -> bool:
        """Whether the header is there whole."""
        return self.end >= self.image.shape.cluster

    def stretches(self, l1_at: int, entries: int, size: int) -> Iterator[Stretch]:
        """Yield what can be read of a disk of *size* bytes with that L1 table."""
        shape = self.image.shape
        cluster = shape.cluster
        for guest in range(0, size, cluster):
            stop = min(size, guest + cluster)
            index, number = divmod(guest // cluster, shape.per_table)
            whole = Stretch(guest, stop, stop - guest)
            lost = Stretch(guest, stop, -1)
            if index >= entries:
                yield whole
                continue
            at = l1_at + 8 * index
            table = self._word(at) & _OFFSET
            place = table + number * shape.stride
            if at + 8 > self.end or (table and place + shape.stride > self.end):
                yield lost
                continue
            entry = self._word(place) if table else 0
            if entry & _COMPRESSED:
                yield self._packed(entry, whole)
                continue
            host = entry & _OFFSET
            bitmap = self._word(place + 8) if table and shape.extended else 0
            stored = bitmap & 0xFFFFFFFF if shape.extended else (entry and not entry & 1)
            if not stored or not (host or shape.external):
                yield whole
            elif not shape.extended:
                yield lost if host >= self.data_end else Stretch(guest, stop, min(stop - guest, self.data_end - host))
            else:
                yield from self._subclusters(guest, stop, host, bitmap)

    def _subclusters(self, guest: int, stop: int, host: int, bitmap: int) -> Iterator[Stretch]:
        step = self.image.shape.cluster // 32
        for number in range(32):
            begin, end = guest + number * step, min(stop, guest + (number + 1) * step)
            if begin >= stop:
                return
            place = host + number * step
            if not bitmap >> number & 1:
                yield Stretch(begin, end, end - begin)
            elif host >= self.data_end:
                yield Stretch(begin, end, -1)
            else:
                yield Stretch(begin, end, max(0, min(end - begin, self.data_end - place)))

    def _packed(self, entry: int, whole: Stretch) -> Stretch:
        shift = 62 - (self.image.shape.bits - 8)
        host = entry & ((1 << shift) - 1)
        behind = host // 512 * 512 + (((entry & (_COMPRESSED - 1)) >> shift) + 1) * 512
        if behind <= self.end:
            return whole
        return whole._replace(there=-1 if host >= self.end else None)

    def _word(self, at: int) -> int:
        found: int = struct.unpack(">Q", self.data[at : at + 8].ljust(8, b"\0"))[0]
        return found

    def active(self) -> list[Stretch]:
        """Return what can be read of the disk."""
        entries, at = struct.unpack_from(">IQ", self.data, 36)
        return list(self.stretches(at, entries, self.image.size))


def draw_cut(image: Image, rng: random.Random) -> Cut:
    """Cut *image*, or its data file, at a length that is anything, or near the end of a cluster."""
    name = "disk.data" if image.shape.external and rng.random() < 0.5 else image.path.name
    length = (image.path.parent / name).stat().st_size
    cluster = image.shape.cluster
    chosen = rng.randrange(length + 1)
    if rng.random() < 0.5:
        chosen += rng.choice((0, 0, 1, -1, 8, -8, 100)) - chosen % cluster
    return Cut(image, name, min(length, max(0, chosen)))


def misread(image: Image, seed: int) -> Iterator[str]:
    """Yield what is wrong with how a cut of *image* is read, copied and written."""
    if REFUSED & image.odd or not image.size:
        return
    rng = random.Random(f"cut {seed}")
    cut = draw_cut(image, rng)
    folder = image.path.parent
    about = f"{cut.name} of {cut.length} bytes"
    with chdir(folder):
        try:
            disk = cowhand.open(image.path, format="qcow2")
        except CowhandError as error:
            if cut.header:
                yield f"{about}: it is not opened: {error}"
            return
        expected = cut.active()
        lost = any(one.there == -1 for one in expected)
        with disk:
            yield from (f"{about}: {text}" for text in _differs(disk, expected, image.content, rng))
            for number, snapshot in enumerate(image.snapshots):
                view = snapshot.view
                told = list(cut.stretches(view.part.at, view.entries, len(snapshot.content)))
                lost = lost or any(one.there == -1 for one in told)
                yield from (f"{about}, snapshot {number}: {text}" for text in _snapshot(disk, image, number, told, rng))
        yield from (f"{about}: {text}" for text in _copied(cut, expected))
        if lost:
            yield from (f"{about}: {text}" for text in _written(cut))


def _snapshot(disk: cowhand.Disk, image: Image, number: int, told: list[Stretch], rng: random.Random) -> Iterator[str]:
    snapshot = image.snapshots[number]
    name = snapshot.ident.decode() or snapshot.name.decode()
    try:
        view = snapshots.open_snapshot(disk, name)
    except CowhandError:
        return  # the table of snapshots may be what was cut off
    with view:
        if view.size == len(snapshot.content):
            yield from _differs(view, told, snapshot.content, rng)


def _differs(disk: cowhand.Disk, expected: list[Stretch], content: bytes, rng: random.Random) -> Iterator[str]:
    for begin, end, there in expected:
        try:
            found = disk.read(begin, end - begin)
        except CowhandError as error:
            if there is not None and there >= 0:
                yield f"{begin:#x} can be read, but: {error!r}"
            continue
        drawn = content[begin:end]
        if there == -1:
            yield f"{begin:#x} is lost, and reads as something"
        elif found != (drawn if there is None else drawn[:there].ljust(len(drawn), b"\0")):
            yield f"{begin:#x} reads as {found[:16].hex()}, and is {drawn[:16].hex()} for {there} bytes"
    for _ in range(3):
        begin = rng.randrange(len(content))
        end = rng.randint(begin + 1, len(content))
        parts = [one for one in expected if one.begin < end and begin < one.end]
        try:
            disk.read(begin, end - begin)
        except CowhandError:
            if all(one.there is not None and one.there >= 0 for one in parts):
                yield f"[{begin:#x}, {end:#x}) can be read, and is not"
        else:
            if any(one.there == -1 for one in parts):
                yield f"[{begin:#x}, {end:#x}) is lost in part, and is read whole"


def _copied(cut: Cut, expected: list[Stretch]) -> Iterator[str]:
    path, content = cut.image.path, cut.image.content
    lost = any(one.there == -1 for one in expected)
    try:
        cowhand.convert(path, "whole.raw", "raw", source_format="qcow2")
    except CowhandError as error:
        if all(one.there is not None and one.there >= 0 for one in expected):
            yield f"it is not converted: {error!r}"
    else:
        if lost:
            yield "it is converted as if it was whole"
    cowhand.convert(path, "salvaged.raw", "raw", source_format="qcow2", salvage=True)
    found = Path("salvaged.raw").read_bytes()
    for begin, end, there in expected:
        if there is None:
            continue
        wanted = content[begin:end][: max(0, there)].ljust(end - begin, b"\0")
        if found[begin:end] != wanted:
            yield f"{begin:#x} is not salvaged: {found[begin : begin + 16].hex()}, and is {wanted[:16].hex()} for {there} bytes"


def _written(cut: Cut) -> Iterator[str]:
    path = cut.image.path
    before = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    try:
        with cowhand.open(path, format="qcow2", writable=True) as disk:
            disk.write(0, b"x" * min(512, disk.size))
        yield "it is written, so that what was lost will read as zeroes"
    except CowhandError:
        for name in (path.name, "disk.data"):
            if name in before and (path.parent / name).read_bytes() != before[name]:
                yield f"the write is refused, and {name} has changed"

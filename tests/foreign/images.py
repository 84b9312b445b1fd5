"""Whole qcow2 images drawn straight from the specification, with freedoms that programs rarely take.

Source: QEMU ``docs/interop/qcow2``. Shares no code with the driver. ``draw(seed, folder)`` writes ``disk.qcow2`` and what belongs to it.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.foreign import bitmaps, extensions
from tests.foreign.parts import Counts, Part, place
from tests.foreign.tables import Drawing, Shape, View

LARGEST = 3 << 19  #: bytes of a disk


@dataclass(slots=True)
class Snapshot:
    """One entry of the snapshot table, and what it shows."""

    ident: bytes
    name: bytes
    view: View
    extra: int
    state: int
    content: bytes = b""


@dataclass(slots=True)
class Image:
    """A drawn image: its path, what its guest sees, and what is special about it."""

    path: Path
    shape: Shape
    size: int
    content: bytes
    snapshots: list[Snapshot]
    most_count: int
    odd: set[str] = field(default_factory=set)


def draw(seed: int, folder: Path) -> Image:
    """Write the image of *seed* into *folder*. One that needs larger counts than its width allows is drawn again with less sharing."""
    for attempt in range(30):
        drawn = _try(random.Random(f"{seed} {attempt}"), folder, sharing=attempt < 15)
        if drawn is not None:
            return drawn
    raise AssertionError(f"seed {seed} gives no image")


def _shape(rng: random.Random, sharing: bool) -> Shape:
    bits = rng.choice((9, 9, 9, 10, 10, 11, 12, 12, 13, 14, 16, 16, rng.randrange(9, 22)))
    version = rng.choice((2, 3, 3, 3))
    order = rng.randrange(7) if version > 2 and rng.random() < 0.7 else 4
    extended = version > 2 and bits >= 14 and rng.random() < 0.4
    external = version > 2 and rng.random() < 0.12
    return Shape(
        bits, version, order, extended, external,
        zstd=version > 2 and not external and rng.random() < 0.25,
        sharing=sharing and order > 0,
        packing=not external and rng.random() < 0.6,
    )  # fmt: skip


def _try(rng: random.Random, folder: Path, sharing: bool) -> Image | None:
    shape = _shape(rng, sharing)
    odd: set[str] = set()
    cluster = shape.cluster
    sectors = rng.randrange(1, min(max(cluster * 120, 3 * 512), max(LARGEST, cluster * 3)) // 512)
    size = sectors * 512
    if rng.random() < 0.08:
        size = rng.choice((0, 1, 511, 512, size - rng.randrange(512), size + 1))
        odd |= {"size"} if size % 512 or not size else set()
    drawing = Drawing(rng, shape)
    header = Part("header", 1)
    views = [drawing.view(size, [])]
    snapshots = [] if shape.external or not shape.sharing else _snapshots(rng, drawing, views, shape, odd)
    kept = bitmaps.draw(rng, drawing, size, odd) if shape.version > 2 and rng.random() < 0.25 else None
    raw_data = shape.external and rng.random() < 0.3
    backing, base = (b"", None) if raw_data or rng.random() < 0.6 else extensions.backing(rng, folder, size)
    table = _snapshot_part(drawing, snapshots, shape)
    counts = Counts(shape.order, cluster, rng.choice((0, 0, 0, 1, 3)))
    leaks = rng.choice((0, 0, 0, 0, 2, 5))
    lost = place(rng, header, drawing.parts, counts, leaks, ordered=rng.random() < 0.2)
    odd |= {"leaks"} if lost else set()
    every = [header, *drawing.parts, *lost, counts.table, *counts.blocks]
    number = _count(drawing, views, every, cluster)
    if max(number.values()) > counts.most:
        return None
    if any(view.size % cluster for view in views):
        odd.add("behind")
    for view in views:
        drawing.encode(view, number, active=view is views[0])
    if snapshots and table is not None:
        table.data = _encode_snapshots(snapshots)
    if kept is not None:
        kept.encode()
    counts.encode(number, rng)
    fields = {
        "size": size, "l1": views[0], "counts": counts, "snapshots": snapshots, "table": table, "bitmaps": kept, "base": base, "raw": raw_data,
    }  # fmt: skip
    header.data = extensions.header(rng, shape, fields, odd)
    path = folder / "disk.qcow2"
    _write(rng, path, every, cluster, odd)
    if shape.external:
        _write_external(folder / "disk.data", drawing, views[0], size, raw_data)
    content = drawing.content(views[0], backing)
    for snap in snapshots:
        snap.content = drawing.content(snap.view, backing, None if snap.extra >= 16 else size)
    return Image(path, shape, size, content, snapshots, max(number.values()), odd)


def _count(drawing: Drawing, views: list[View], every: list[Part], cluster: int) -> Counter[int]:
    """Return the count of each host cluster: one for a structure or a leak, and the ways to tables and guest data."""
    number: Counter[int] = Counter()
    for part in every:
        if part.name not in ("data", "packed", "L2 table"):
            number.update(range(part.at // cluster, part.at // cluster + part.clusters))
    drawing.count(views, number)
    return number


def _snapshots(rng: random.Random, drawing: Drawing, views: list[View], shape: Shape, odd: set[str]) -> list[Snapshot]:
    out: list[Snapshot] = []
    for number in range(rng.choice((0, 0, 0, 1, 2, 4))):
        extra = rng.choice((16, 24, 24, 32, 61)) if shape.version > 2 else rng.choice((0, 8, 16, 24, 40))
        size = views[0].size
        if extra >= 16 and rng.random() < 0.4:
            size = rng.randrange(1, min(2 * size, LARGEST) // 512 + 2) * 512
        state = rng.choice((0, 0, 0, 100, shape.cluster + 1))
        view = drawing.view(size, views, state=state)
        views.append(view)
        name = rng.choice(
            (
                b"s%d" % number,
                b"s%d" % number,
                f"ß☃{number}".encode(),
                b"n" * 255,
                b"%d" % (number + 5),
                b"",
                b"a b'\"\\%d" % number,
            )
        )
        ident = rng.choice(
            (b"%d" % (number + 1), b"%d" % (number + 1), b"%d" % (number * 1000 + 7), b"id-%d" % number, b"")
        )
        if any(s.ident == ident or s.name == name for s in out):
            ident, name = b"%d" % (number + 1), b"s%d" % number
        if not ident or not name:
            odd.add("nameless")
        out.append(Snapshot(ident, name, view, extra, state))
    return out


def _snapshot_part(drawing: Drawing, snapshots: list[Snapshot], shape: Shape) -> Part | None:
    if not snapshots:
        return None
    return drawing.part("snapshot table", -(-len(_encode_snapshots(snapshots)) // shape.cluster))


def _encode_snapshots(snapshots: list[Snapshot]) -> bytes:
    out = b""
    for number, snap in enumerate(snapshots):
        extra = (
            struct.pack(">QQQ", snap.state, snap.view.size, (1 << 64) - 1 if number % 2 else 77)
            + b"unknown extra data of some kind, 37 bytes"
        )[: snap.extra]
        out += bytes(-len(out) % 8)
        out += struct.pack(
            ">QIHHIIQII", snap.view.part.at, snap.view.entries, len(snap.ident), len(snap.name), 1_700_000_000 + number, number, 10**10 * number,
            snap.state, snap.extra,
        )  # fmt: skip
        out += extra + snap.ident + snap.name
    return out


def _write(rng: random.Random, path: Path, parts: list[Part], cluster: int, odd: set[str]) -> None:
    """Write *parts*; the file may end inside its last cluster, or go on behind what is used."""
    end = max(part.at + part.clusters * cluster for part in parts)
    with path.open("wb") as file:
        for part in parts:
            file.seek(part.at)
            file.write(part.data)
        last = file.seek(0, 2)
        choice = rng.random()
        if choice < 0.5:
            file.truncate(end)
        elif choice < 0.75:
            file.truncate(rng.randint(min(max(last, end - cluster + 1), end), end))
            odd.add("cut")
        elif choice < 0.9:
            file.truncate(end + rng.randrange(5 * cluster))
        else:
            file.seek(end)
            file.write(rng.randbytes(rng.randrange(1, 3 * cluster)))


def _write_external(path: Path, drawing: Drawing, view: View, size: int, raw: bool) -> None:
    """Write the data file. Without the raw bit its bytes that no entry names are anything."""
    shape = drawing.shape
    with path.open("wb") as file:
        file.write(bytes(size) if raw else b"?" * size)
        for index, table in view.tables.items():
            for number, entry in table.entries.items():
                if entry.host is not None or raw:
                    at = (index * shape.per_table + number) * shape.cluster
                    file.seek(at)
                    body = entry.content if entry.kind == "data" or not raw else bytes(shape.cluster)
                    file.write(body[: max(0, size - at)])
        if raw:
            file.seek(0)
            file.write(drawing.content(view, b""))

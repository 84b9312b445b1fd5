"""Persistent bitmaps of drawn images, in every state.

Source: QEMU ``docs/interop/qcow2``, "Bitmaps". Shares no code with the driver.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from tests.foreign.parts import Part
from tests.foreign.tables import Drawing

IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4


@dataclass(slots=True)
class Bitmap:
    """One bitmap: its name, flags, and what each cluster of its data is: a part, or 0 or 1 for all its bits."""

    name: bytes
    flags: int
    bits: int
    table: Part
    clusters: list[Part | int]
    extra: bytes = b""

    def encode(self) -> bytes:
        """Fill the table; return the directory's entry."""
        words = [one if isinstance(one, int) else one.at for one in self.clusters]
        self.table.data = struct.pack(f">{len(words)}Q", *words)
        head = struct.pack(
            ">QIIBBHI", self.table.at, len(words), self.flags, 1, self.bits, len(self.name), len(self.extra)
        )
        body = head + self.extra + self.name
        return body + bytes(-len(body) % 8)


@dataclass(slots=True)
class Directory:
    """All bitmaps of an image."""

    part: Part
    bitmaps: list[Bitmap] = field(default_factory=list)

    def encode(self) -> None:
        """Fill the directory and the tables."""
        self.part.data = b"".join(bitmap.encode() for bitmap in self.bitmaps)

    def extension(self) -> bytes:
        """Return the header extension's data."""
        return struct.pack(">IIQQ", len(self.bitmaps), 0, len(self.part.data), self.part.at)


def draw(rng: random.Random, drawing: Drawing, size: int, odd: set[str]) -> Directory | None:
    """Return bitmaps of a disk of *size* bytes."""
    cluster = drawing.shape.cluster
    if not size or size % 512:  # QEMU leaves the last part of a sector off, and then finds bitmaps too large
        return None
    made = []
    for number in range(rng.randint(1, 4)):
        bits = rng.choice((9, 9, 10, 12, 16, 20, 31))
        flags = rng.choice((0, AUTO, AUTO, IN_USE, IN_USE | AUTO))
        extra = b""
        if rng.random() < 0.03:
            extra, flags = b"extra", flags | rng.choice((0, EXTRA_COMPATIBLE))
            odd.add("bitmap extra")
        granules = -(-size >> bits)
        length = (granules + 7) // 8
        entries = -(-length // cluster)
        if flags & IN_USE and rng.random() < 0.3:
            entries = max(1, entries + rng.choice((-1, 1)))
        clusters: list[Part | int] = []
        for index in range(entries):
            # The bits behind the last granule are zero.
            whole = (index + 1) * cluster * 8 <= granules
            if rng.random() < 0.5:
                clusters.append(rng.randrange(2) if whole else 0)
                continue
            valid = max(0, min(cluster * 8, granules - index * cluster * 8))
            word = rng.getrandbits(valid) if valid else 0
            clusters.append(drawing.part("bitmap data", 1, word.to_bytes(cluster, "little")))
        table = drawing.part("bitmap table", -(-entries * 8 // cluster))
        name = rng.choice(
            (
                b"b%d" % number,
                f"Bît{number}".encode(),
                b"x" * rng.choice((255, 1023)) if number == 0 else b"y%d" % number,
            )
        )
        made.append(Bitmap(name, flags, bits, table, clusters, extra))
    directory = Directory(Part("bitmap directory", 1), made)
    directory.encode()
    directory.part.clusters = -(-len(directory.part.data) // cluster)
    drawing.parts.append(directory.part)
    return directory

"""Views of a drawn image, the disk's and its snapshots': L1 and L2 tables over data, zeroes and compressed clusters that they may share.

Source: QEMU ``docs/interop/qcow2``, "Cluster mapping", "Extended L2 Entries", "Snapshots". Shares no code with the driver.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from dataclasses import dataclass, field

from tests.foreign import payload
from tests.foreign.parts import Part

COPIED = 1 << 63
COMPRESSED = 1 << 62


@dataclass(eq=False, slots=True)
class Entry:
    """What one guest cluster is. A ``host`` part of one cluster, at ``index`` of it; or a ``packed`` payload inside a part, ``at`` its byte."""

    kind: str  #: data, zero, packed
    host: Part | None = None
    index: int = 0
    content: bytes = b""
    at: int = 0
    sectors: int = 0  #: additional ones
    bitmap: int = 0  #: of subclusters

    def place(self, cluster: int) -> int:
        assert self.host is not None
        return self.host.at + self.index * cluster

    def clusters(self, cluster: int) -> range:
        """Return the numbers of the host clusters that it takes."""
        if self.host is None:
            return range(0)
        if self.kind == "packed":
            begin = self.host.at + self.at
            return range(begin // cluster, (begin // 512 * 512 + self.sectors * 512 + 511) // cluster + 1)
        first = self.place(cluster) // cluster
        return range(first, first + 1)


@dataclass(eq=False, slots=True)
class Table:
    """An L2 table."""

    part: Part
    entries: dict[int, Entry]


@dataclass(eq=False, slots=True)
class View:
    """An L1 table; ``size`` is the disk's."""

    part: Part
    size: int
    entries: int
    tables: dict[int, Table]


@dataclass(slots=True)
class Shape:
    """What was decided about an image before its tables."""

    bits: int
    version: int
    order: int
    extended: bool = False
    external: bool = False
    zstd: bool = False
    sharing: bool = True  #: counts may exceed 1
    packing: bool = True  #: compressed clusters

    @property
    def cluster(self) -> int:
        return 1 << self.bits

    @property
    def stride(self) -> int:
        return 16 if self.extended else 8

    @property
    def per_table(self) -> int:
        return self.cluster // self.stride


@dataclass(slots=True)
class Drawing:
    """Draws tables for *shape*; ``parts`` are what was made on the way."""

    rng: random.Random
    shape: Shape
    parts: list[Part] = field(default_factory=list)
    areas: list[list[int]] = field(default_factory=list)  #: [part's index, bytes used] of compressed clusters
    pool: list[Entry] = field(default_factory=list)

    def part(self, name: str, clusters: int = 1, data: bytes = b"") -> Part:
        made = Part(name, clusters, data)
        self.parts.append(made)
        return made

    # -- entries

    def entry(self, guest: int) -> Entry:
        rng, shape = self.rng, self.shape
        if shape.sharing and self.pool and not shape.external and rng.random() < 0.06:
            return rng.choice(self.pool)
        kind = rng.choices(("data", "zero", "packed"), (6, 2 * (shape.version > 2), 3 * shape.packing))[0]
        if kind == "packed":
            made = self._packed()
        elif shape.extended:
            made = self._subclusters(guest)
        else:
            allocated = kind == "data" or rng.random() < 0.4
            host, index = self._host(guest) if allocated else (None, 0)
            body = payload.content(rng, shape.cluster)
            made = Entry(kind, host, index, body if kind == "data" else bytes(shape.cluster))
            if host is not None:
                self._fill(host, index, body)
        self.pool.append(made)
        return made

    def _host(self, guest: int) -> tuple[Part, int]:
        if self.shape.external:
            return Part("external", 1, b"", guest), 0
        last = self.parts[-1] if self.parts else None
        if last is not None and last.name == "data" and self.rng.random() < 0.5:
            last.clusters += 1
            return last, last.clusters - 1
        return self.part("data"), 0

    def _fill(self, host: Part, index: int, body: bytes) -> None:
        host.data = host.data.ljust(index * self.shape.cluster, b"\0") + body

    def _subclusters(self, guest: int) -> Entry:
        rng, shape = self.rng, self.shape
        allocated = rng.random() < 0.8
        data = (
            rng.choice((0xFFFFFFFF, rng.getrandbits(32), rng.getrandbits(32) & rng.getrandbits(32), 0))
            if allocated
            else 0
        )
        zero = rng.choice((0, rng.getrandbits(32), 0xFFFFFFFF)) & ~data & 0xFFFFFFFF
        host, index = self._host(guest) if allocated else (None, 0)
        body = payload.content(rng, shape.cluster)
        if host is not None:
            self._fill(host, index, body)
        return Entry("data" if host is not None else "zero", host, index, body, bitmap=zero << 32 | data)

    def _packed(self) -> Entry:
        rng, shape = self.rng, self.shape
        body = payload.content(rng, shape.cluster)
        form = payload.zstd if shape.zstd else payload.deflated
        most = 1 << shape.bits - 8
        for _ in range(20):
            packed = form(rng, body)
            fresh = not self.areas or not shape.sharing or rng.random() < 0.3
            if fresh:
                self.part("packed", 1)
                self.areas.append([len(self.parts) - 1, rng.choice((0, rng.randrange(shape.cluster)))])
            area = self.areas[-1 if fresh else rng.randrange(len(self.areas))]
            part, at = self.parts[area[0]], area[1] + rng.choice((0, 0, 1, rng.randrange(700)))
            sectors = (at + len(packed) - 1) // 512 - at // 512
            if sectors >= most:
                body = payload.content(rng, shape.cluster)
                continue
            sectors = rng.choice((sectors, sectors, sectors, most - 1, rng.randint(sectors, most - 1)))
            part.data = part.data.ljust(at, b"\0") + packed
            part.clusters = max(part.clusters, ((at // 512 + sectors) * 512 + 511) // shape.cluster + 1)
            area[1] = at + len(packed)
            return Entry("packed", part, 0, body, at, sectors)
        return Entry("data", *self._whole(body))

    def _whole(self, body: bytes) -> tuple[Part, int, bytes]:
        host, index = self.part("data"), 0
        self._fill(host, index, body)
        return host, index, body

    # -- tables

    def table(self, index: int, size: int, like: Table | None = None) -> Table:
        """Return an L2 table for L1 entry *index* of a disk of *size* bytes; *like* lends some of its entries."""
        rng, shape = self.rng, self.shape
        part = self.part("L2 table")
        entries = {n: e for n, e in like.entries.items() if rng.random() < 0.7} if like is not None else {}
        first = index * shape.per_table
        end = min(shape.per_table, max(1, -(-size // shape.cluster) - first))
        density = rng.choice((0.2, 0.6, 1.0))
        for number in range(min(end, 40)):
            at = number if end <= 40 else rng.randrange(end)
            if at not in entries and rng.random() < density:
                entries[at] = self.entry((first + at) * shape.cluster)
        return Table(part, entries)

    def view(self, size: int, others: list[View], *, state: int = 0) -> View:
        """Return an L1 table for *size* bytes, sharing tables with *others*; *state* bytes of VM state lie behind the disk."""
        rng, shape = self.rng, self.shape
        needed = -(-size // (shape.cluster * shape.per_table))
        entries = needed + rng.choice((0, 0, 0, 1, 3, rng.randrange(200)))
        tables: dict[int, Table] = {}
        for index in range(needed):
            choice = rng.random()
            lenders = [v.tables[index] for v in others if index in v.tables]
            if choice < 0.15:
                continue
            if choice < 0.45 and lenders:
                tables[index] = rng.choice(lenders)
            elif choice < 0.5 and shape.sharing and tables and not shape.external:
                tables[index] = rng.choice(list(tables.values()))
            else:
                like = rng.choice(lenders) if lenders and rng.random() < 0.8 else None
                tables[index] = self.table(index, size, like)
        if state:
            entries = max(entries, needed + 1)
            tables[needed] = self.table(needed, (needed * shape.per_table + -(-state // shape.cluster)) * shape.cluster)
        part = self.part("L1 table", max(1, -(-entries * 8 // shape.cluster)) if entries else 1)
        return View(part, size, entries, tables)

    # -- results

    def count(self, views: list[View], counts: Counter[int]) -> None:
        """Add what *views* refer to, once for each way there."""
        cluster = self.shape.cluster
        for view in views:
            for table in view.tables.values():
                counts[table.part.at // cluster] += 1
                if self.shape.external:
                    continue
                for entry in table.entries.values():
                    counts.update(entry.clusters(cluster))

    def encode(self, view: View, counts: Counter[int], *, active: bool) -> None:
        """Fill the L1 table of *view* and its L2 tables."""
        cluster = self.shape.cluster
        words = [0] * view.entries
        for index, table in view.tables.items():
            alone = counts[table.part.at // cluster] == 1
            words[index] = table.part.at | (COPIED if (alone if active else alone and self.rng.random() < 0.5) else 0)
            if active or not table.part.data:
                table.part.data = self._encode(table, counts, active)
        view.part.data = struct.pack(f">{view.entries}Q", *words)

    def _encode(self, table: Table, counts: Counter[int], active: bool) -> bytes:
        shape = self.shape
        out = bytearray(shape.cluster)
        for number, entry in table.entries.items():
            if entry.kind == "packed":
                assert entry.host is not None
                word = COMPRESSED | entry.sectors << 62 - (shape.bits - 8) | entry.host.at + entry.at
            else:
                word = 1 if entry.kind == "zero" and not shape.extended else 0
                if entry.host is not None:
                    place = entry.place(shape.cluster)
                    alone = shape.external or counts[place // shape.cluster] == 1
                    word |= place | (
                        COPIED if (alone if active or shape.external else alone and self.rng.random() < 0.5) else 0
                    )
            struct.pack_into(">Q", out, number * shape.stride, word)
            if shape.extended:
                struct.pack_into(">Q", out, number * shape.stride + 8, entry.bitmap)
        return bytes(out)

    def content(self, view: View, backing: bytes, size: int | None = None) -> bytes:
        """Return what the guest sees of *view*, as a disk of *size* bytes."""
        shape = self.shape
        size = view.size if size is None else size
        disk = bytearray(backing[:size].ljust(size, b"\0"))
        for index, table in view.tables.items():
            for number, entry in table.entries.items():
                at = (index * shape.per_table + number) * shape.cluster
                if at >= size:
                    continue
                if not shape.extended or entry.kind == "packed":
                    disk[at : at + shape.cluster] = entry.content[: size - at]
                    continue
                step = shape.cluster // 32
                for sub in range(32):
                    begin = at + sub * step
                    if begin < size and entry.bitmap & (1 << sub | 1 << 32 + sub):
                        piece = entry.content[sub * step : (sub + 1) * step] if entry.bitmap >> sub & 1 else bytes(step)
                        disk[begin : begin + step] = piece[: size - begin]
        return bytes(disk[:size])

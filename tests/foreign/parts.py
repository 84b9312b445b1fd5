"""Where the pieces of a drawn image lie: runs of host clusters in any order, with gaps, and the reference counts that follow from that.

Source: QEMU ``docs/interop/qcow2``, "Host cluster management". Shares no code with the driver.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Part:
    """Host clusters that must adjoin each other. ``at`` is their place in bytes, once they have one."""

    name: str
    clusters: int
    data: bytes = b""
    at: int = 0


@dataclass(slots=True)
class Counts:
    """The refcount table and its blocks. ``extra`` says how many more entries the table has than it needs."""

    order: int
    cluster: int
    extra: int
    table: Part = field(default_factory=lambda: Part("refcount table", 1))
    blocks: list[Part] = field(default_factory=list)

    @property
    def most(self) -> int:
        """The largest count."""
        return (1 << (1 << self.order)) - 1

    @property
    def per_block(self) -> int:
        """How many clusters a block counts."""
        return self.cluster * 8 >> self.order

    def encode(self, counts: Counter[int], rng: random.Random) -> None:
        """Fill table and blocks. Blocks that no count needs cover ranges of zeroes, before or behind the end of the file."""
        needed = sorted({number // self.per_block for number, count in counts.items() if count})
        entries = self.table.clusters * self.cluster // 8
        spare = [index for index in range(min(entries, needed[-1] + 40)) if index not in needed]
        rng.shuffle(spare)
        chosen = needed + spare[: len(self.blocks) - len(needed)]
        words = [0] * entries
        for index, block in zip(chosen, self.blocks, strict=True):
            words[index] = block.at
            block.data = self._block(counts, index * self.per_block)
        self.table.data = struct.pack(f">{entries}Q", *words)

    def _block(self, counts: Counter[int], first: int) -> bytes:
        width = 1 << self.order
        if width >= 8:
            return b"".join(counts[first + n].to_bytes(width // 8, "big") for n in range(self.per_block))
        out = bytearray(self.cluster)
        for number in range(self.per_block):
            out[number * width // 8] |= counts[first + number] << number * width % 8
        return bytes(out)


def place(rng: random.Random, header: Part, parts: list[Part], counts: Counts, leaks: int, ordered: bool) -> list[Part]:
    """Give all parts and the refcount structures their places; return the clusters that are counted and that nobody names."""
    lost = [Part("leak", rng.randint(1, 3), rng.randbytes(counts.cluster)) for _ in range(leaks)]
    gap_seed = rng.random()
    header.at = 0
    want = 1 + (counts.extra > 0) * rng.randrange(3)
    for _ in range(100):
        counts.blocks = [Part("refcount block", 1) for _ in range(want)]
        everything = [*parts, *lost, counts.table, *counts.blocks]
        own = random.Random(gap_seed)
        if not ordered:
            own.shuffle(everything)
        far = (
            own.randrange(len(everything)) if counts.per_block * counts.cluster < 200_000 and own.random() < 0.4 else -1
        )
        at = 1
        for number, part in enumerate(everything):
            if not ordered and own.random() < 0.15:
                at += own.randint(1, 5)
            if number == far:
                at += own.randint(1, 3) * counts.per_block
            part.at = at * counts.cluster
            at += part.clusters
        needed = len(
            {
                (part.at // counts.cluster + n) // counts.per_block
                for part in [header, *everything]
                for n in range(part.clusters)
            }
        )
        table = -(-8 * -(-at // counts.per_block) // counts.cluster) + counts.extra
        if needed <= want and table <= counts.table.clusters and want - needed < 8:
            return lost
        want = max(want, needed)
        counts.table.clusters = max(table, counts.table.clusters)
    raise AssertionError("no place for the refcount blocks")

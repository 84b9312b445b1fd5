"""Images whose life two programs share: their shapes, the requests that hypothesis draws, and what the guest must find afterwards.

A request is a tuple of numbers that any image can make sense of (:func:`requests`), so that it can be shrunk, and given to either program.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, settings, strategies as st

from cowhand.testing.machine import SCALE

#: Cluster sizes of qcow2, all of them.
CLUSTERS = tuple(1 << bits for bits in range(9, 22))
#: Largest disk of these tests: it has to hold several clusters of 2 MiB and is compared often.
LARGEST = 12 << 20

VERBS = (
    ("write",) * 6
    + ("compress",) * 2
    + ("zero",) * 3
    + ("discard",) * 2
    + ("flush", "snapshot", "apply", "delete", "grow")
)


def examples(count: int) -> settings:
    """Return settings for *count* examples times COWHAND_TEST_SCALE; the same ones every time, but for COWHAND_TEST_RANDOM."""
    import os

    return settings(
        max_examples=max(1, int(count * SCALE)),
        derandomize="COWHAND_TEST_RANDOM" not in os.environ,
        database=None,
        deadline=None,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """What an image is made with. ``formats``: the backing files', topmost first; ``sizes``: of the disk and of each of them."""

    cluster: int
    version: int = 3
    refcount_bits: int = 16
    compression: str = "zlib"
    lazy: bool = False
    formats: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1 << 20,)
    extended: bool = False  #: subclusters
    data: str = ""  #: "plain" or "raw": an external data file

    def options(self, path: Path | None = None) -> dict[str, str]:
        """Return what ``create -o`` takes for an image at *path*."""
        out = {"cluster_size": str(self.cluster), "compat": "0.10" if self.version == 2 else "1.1"}
        if self.version > 2:
            out["refcount_bits"] = str(self.refcount_bits)
            out["compression_type"] = self.compression
            if self.lazy:
                out["lazy_refcounts"] = "on"
        if self.extended:
            out["extended_l2"] = "on"
        if self.data:
            out["data_file"] = f"{path}.data"
        if self.data == "raw":
            out["data_file_raw"] = "on"
        return out

    @property
    def most_snapshots(self) -> int:
        """How many snapshots may name one cluster besides the disk itself, and one more while a snapshot is applied."""
        return 0 if self.data else max(0, min(3, (1 << self.refcount_bits) - 3))

    def below(self) -> Shape:
        """Return the shape of the backing file: a qcow2 of another cluster size."""
        cluster = {512: 65536, 65536: 4096}.get(self.cluster, 65536)
        return Shape(cluster, formats=self.formats[1:], sizes=self.sizes[1:])


@st.composite
def shapes(
    draw: st.DrawFn, clusters: tuple[int, ...] = CLUSTERS, depths: tuple[int, ...] = (0, 0, 1, 2, 3, 4)
) -> Shape:
    """Draw a shape; sizes reach from one sector to some hundred clusters."""
    cluster = draw(st.sampled_from(clusters))
    version = draw(st.sampled_from((3, 3, 2)))
    depth = draw(st.sampled_from(depths))
    lowest = draw(st.sampled_from(("raw", "qcow2")))
    largest = min(cluster * 300, LARGEST)
    return Shape(
        cluster,
        version,
        draw(st.sampled_from((16, 1, 2, 4, 8, 32, 64))) if version > 2 else 16,
        draw(st.sampled_from(("zlib", "zstd"))) if version > 2 else "zlib",
        draw(st.booleans()) if version > 2 else False,
        ("qcow2",) * (depth - 1) + (lowest,) if depth else (),
        tuple(draw(st.integers(1, largest // 512)) * 512 for _ in range(depth + 1)),
    )


class Request(NamedTuple):
    """One drawn request: where and how long by large numbers, which an image brings into its range; ``seed`` for its content or kind."""

    verb: str
    place: int
    shape: int
    seed: int


def requests(most: int) -> st.SearchStrategy[list[Request]]:
    """Return a strategy for up to *most* requests."""
    number = st.integers(0, (1 << 24) - 1)
    return st.lists(st.builds(Request, st.sampled_from(VERBS), number, number, st.integers(1, 255)), max_size=most)


def span(request: Request, size: int, cluster: int) -> tuple[int, int]:
    """Return (offset, length) inside a disk of *size* bytes: small or large, aligned to nothing, a sector or a cluster."""
    length = (
        512,
        4096,
        cluster,
        2 * cluster,
        3 * cluster + 512,
        1 + request.shape % (5 * cluster),
        request.shape % 7000 + 1,
    )[request.shape % 7]
    length = min(length, size, 3 << 20)
    offset = request.place % (size - length + 1)
    offset -= offset % (1, 512, cluster)[request.seed % 3]
    return offset, length


class Expected:
    """What the guest must find: the content, and where a discard leaves the choice between it and zeroes."""

    def __init__(self, size: int, below: bytes = b"") -> None:
        self.content = bytearray(below[:size].ljust(size, b"\0"))
        self.open = bytearray(size)  #: 1 where a discard left the choice
        self.snapshots: dict[str, bytes] = {}
        self.touched: set[int] = set()  #: clusters that any request named: not to be compressed into

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, offset: int, data: bytes) -> None:
        """The guest writes."""
        self.content[offset : offset + len(data)] = data
        self.open[offset : offset + len(data)] = bytes(len(data))

    def discard(self, offset: int, length: int) -> None:
        """The guest discards."""
        self.open[offset : offset + length] = b"\1" * length

    def resize(self, size: int) -> None:
        """The disk grows."""
        self.content = self.content.ljust(size, b"\0")
        self.open = self.open.ljust(size, b"\0")

    def settle(self, found: bytes, what: str) -> None:
        """Compare with *found*, all of the disk; from now on discarded bytes are what was found."""
        assert len(found) == self.size, f"{what} has {len(found)} bytes, expected {self.size}"
        if found != self.content:
            for at in range(0, self.size, 512):
                if found[at : at + 512] != self.content[at : at + 512]:
                    self._compare(found, at, min(at + 512, self.size), what)
            self.content = bytearray(found)
        self.open = bytearray(self.size)

    def _compare(self, found: bytes, begin: int, end: int, what: str) -> None:
        for at in range(begin, end):
            now, was = found[at], self.content[at]
            assert now == was or (self.open[at] and now == 0), (
                f"{what}: byte {at:#x} is {now:#04x}, expected {was:#04x}"
            )


#: Content to be repeated by ``qemu-io write -s``: of a length that no alignment divides, so that nothing goes unnoticed that is misplaced.
PATTERN_SIZE = 4099


def pattern(seed: int, length: int) -> bytes:
    """Return *length* bytes by *seed*: what both programs write. One seed in eight gives what compresses well."""
    unit = random.Random(seed).randbytes(PATTERN_SIZE) if seed % 8 else (b"%03d " % seed * 2000)[:PATTERN_SIZE]
    return (unit * (length // PATTERN_SIZE + 1))[:length]


Draw = Callable[[st.SearchStrategy[Any]], Any]

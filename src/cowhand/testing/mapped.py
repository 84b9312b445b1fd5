"""What every format that is read has to keep to, written or not: its map, its batches, and headers and tables that lie.

class TestMine(MappedContract):
    driver = "mine"
    def make_image(self, folder, content): ...   # returns the image's first file
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from cowhand.block.disk import Disk
from cowhand.block.format_io.mapped import MappedFormat
from cowhand.block.graph import graph
from cowhand.block.node.node import READ, BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.core.errors import CowhandError
from cowhand.core.extents import COMPRESSED, DATA, OFFSET, ZERO
from cowhand.drivers import REGISTRY
from cowhand.testing.model import compare
from cowhand.testing.nodes import NodeContract

#: Damaged copies of an image that are tried.
MUTATIONS = int(os.environ.get("COWHAND_MUTATIONS", "150"))
#: Seconds that opening, mapping and reading a part of a small damaged image may take.
PATIENCE = 5.0
_READ = 256 << 10
_BATCHES = 20


class MappedContract(NodeContract):
    """Tests of reading any format. Override :meth:`make_image`; ``metadata`` gives the ranges of the file that hold headers and tables."""

    driver: ClassVar[str]

    def make_image(self, folder: Path, content: bytes) -> Path:
        """Make an image that holds *content* in *folder*, by a way around the code under test where there is one."""
        raise NotImplementedError

    def metadata(self, image: Path) -> list[tuple[int, int]]:
        """Return [begin, end) of the parts of the file *image* that are not the disk's bytes; the default is its first 4 KiB."""
        return [(0, min(4096, image.stat().st_size))]

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        return self.open_image(self.make_image(folder, content), writable=writable)

    def open_image(self, image: Path, *, writable: bool = False) -> BlockNode:
        """Open *image* as this format."""
        return Opening(REGISTRY).open(str(image), format=self.driver, options={"read-only": not writable})

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        return self.content()  # what is only read keeps what it was made with

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[BlockNode]:
        """A node that is read."""
        node = self.make_node(tmp_path, self.content(), writable=False)
        yield node
        if not node.closed:
            graph.close_node(node)

    def test_runs_are_total_and_lie_where_they_say(self, node: BlockNode) -> None:
        assert isinstance(node, MappedFormat)
        content, offset = self.content(), 0
        while offset < self.size:
            length, flags, child, host = node.map(offset, self.size - offset)
            assert 0 < length <= self.size - offset
            expected = content[offset : offset + length]
            if flags & ZERO:
                compare(bytes(length), expected, f"zeroes at {offset:#x}")
            if flags & OFFSET and not flags & COMPRESSED and flags & DATA:
                assert child is not None
                found = bytearray(length)
                child.read_into(host, found)
                compare(expected, bytes(found), f"the bytes of {offset:#x} where the map says")
            inside = offset + length // 2
            assert node.map(inside, 1)[0] == 1
            offset += length

    def test_batches_say_what_runs_say(self, node: BlockNode) -> None:
        assert isinstance(node, MappedFormat)
        self.check_map(node, 0, self.size)
        offset = 0
        while offset < self.size:
            batch = node.map_batch(offset, self.size - offset)
            for row in batch:
                length, flags, _, host = node.map(row.start, row.length)
                assert length <= row.length
                assert flags == row.flags
                assert not flags & OFFSET or host == row.host
            offset = batch.end

    def test_scattered_reads_of_a_batch(self, node: BlockNode) -> None:
        rng, content = random.Random(11), self.content()
        wanted = [(rng.randrange(self.size - 5000), bytearray(rng.choice((1, 512, 4096, 5000)))) for _ in range(60)]
        begin = rng.randrange(self.size - 40_000)
        wanted += [(begin + at * 4096, bytearray(4096)) for at in range(8)]  # neighbours
        with Disk(node) as disk:
            disk.submit([(READ, offset, buffer) for offset, buffer in wanted])
        for offset, buffer in wanted:
            compare(content[offset : offset + len(buffer)], bytes(buffer), f"the read at {offset:#x}")

    def test_damaged_copies_are_read_or_refused_in_bounded_time(self, tmp_path: Path) -> None:
        image = self.make_image(tmp_path, self.content())
        good = image.read_bytes()
        ranges = self.metadata(image)
        rng = random.Random(self.driver)
        for number in range(MUTATIONS):
            bad = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                begin, end = rng.choice(ranges)
                at = rng.randrange(begin, end)
                width = rng.choice((1, 1, 2, 4, 8))
                value = rng.choice((b"\0", b"\1", b"\x7f", b"\x80", b"\xff", rng.randbytes(1))) * width
                bad[at : at + width] = value[: len(bad) - at]
            if rng.random() < 0.1:
                del bad[rng.randrange(len(bad)) :]
            image.write_bytes(bad)
            began = time.monotonic()
            self._read_some(image)
            assert time.monotonic() - began < PATIENCE, f"mutation {number} took too long"

    def _read_some(self, image: Path) -> None:
        """Open, map and read the beginning and the end of *image*; only cowhand's own errors may come."""
        try:
            with Disk(self.open_image(image)) as disk:
                for number, _ in enumerate(disk.extents()):
                    if number == _BATCHES:
                        break
                count = min(disk.size, _READ)
                for offset in (0, disk.size - count):
                    assert len(disk.read(offset, count)) == count
        except CowhandError:
            pass

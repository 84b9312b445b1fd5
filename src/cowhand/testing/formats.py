"""What every image format has to keep to, beyond the contract of nodes: allocation, backing files, and being opened again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.graph import graph
from cowhand.block.node.node import DISCARD, WRITE_REQUEST, ZERO_REQUEST, BlockNode
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.extents import ALLOCATED, DATA, ZERO
from cowhand.testing.model import DiskModel, compare
from cowhand.testing.nodes import NodeContract, in_threads


class FormatContract(NodeContract):
    """Tests of any format. Override what :class:`NodeContract` asks for, :meth:`open_again`, and :meth:`make_overlay` where there is backing.

    ``make_node`` makes an image with the content and opens it. After each test, :meth:`check_image` looks for damage.
    """

    def open_again(self, folder: Path, writable: bool = True, backing: BlockNode | None = None) -> BlockNode:
        """Open the image that *folder* holds once more; *backing* lies under it instead of what it names."""
        raise NotImplementedError

    def make_overlay(self, folder: Path, backing: BlockNode, size: int) -> BlockNode:
        """Make an image of *size* bytes in *folder* that allocates nothing, over *backing*, and open it."""
        pytest.skip("this format has no backing files")

    def check_image(self, folder: Path) -> None:
        """Assert that the closed image in *folder* is undamaged; the default knows no check."""

    @pytest.fixture(autouse=True)
    def undamaged(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
        """Check the image after the test has closed it."""
        yield
        for name in ("disk", "overlay", "node"):
            if name in request.fixturenames:
                self.check_image(tmp_path)
                return

    @pytest.fixture
    def base(self) -> bytes:
        """The backing file's content: shorter than the disk by three quarters of a sector."""
        return self.content()[: self.size - 65536 - 384]

    @pytest.fixture
    def overlay(self, tmp_path: Path, base: bytes) -> Iterator[Disk]:
        """An empty image over :meth:`base`."""
        node = self.make_overlay(tmp_path, MemoryNode(content=base), self.size)
        with Disk(node, writable=True) as disk:
            yield disk

    @pytest.fixture
    def layered(self, base: bytes) -> DiskModel:
        """The model of :meth:`overlay`."""
        return DiskModel(self.size, base)

    @staticmethod
    def unit_of(node: BlockNode) -> int:
        """Return the allocation unit; the contract's offsets have to hold several."""
        assert isinstance(node, FormatNode)
        return node.allocation_unit

    # -- life

    def test_units_are_plausible(self, node: BlockNode) -> None:
        assert isinstance(node, FormatNode)
        assert node.is_format
        assert not node.is_filter
        assert node.allocation_unit % node.copy_unit == 0
        assert node.primary is not None

    def test_content_is_there_when_the_image_is_opened_again(self, tmp_path: Path) -> None:
        model = DiskModel(self.size, self.content())
        rng = random.Random(1)
        node = self.make_node(tmp_path, self.content())
        for _ in range(4):
            with Disk(node, writable=True) as disk:
                for _ in range(10):
                    offset, data = rng.randrange(self.size - 70_000), rng.randbytes(rng.choice((3, 4096, 70_000)))
                    disk.write(offset, data)
                    model.write(offset, data)
                offset = rng.randrange(self.size - 70_000)
                disk.write_zeroes(offset, 70_000, unmap=rng.random() < 0.5)
                model.write_zeroes(offset, 70_000)
                model.compare(disk.read(0, self.size), "the disk before it is closed")
            self.check_image(tmp_path)
            node = self.open_again(tmp_path)
            with Disk(self.reader(tmp_path, node)) as disk:
                model.compare(disk.read(0, self.size), "the disk after it was opened again")
            node = self.open_again(tmp_path)
        graph.close_node(node)

    def reader(self, folder: Path, node: BlockNode) -> BlockNode:
        """Return *folder*'s image opened for reading, *node* being closed before."""
        graph.close_node(node)
        return self.open_again(folder, writable=False)

    def test_reading_changes_no_byte_of_the_image(self, tmp_path: Path) -> None:
        graph.close_node(self.make_node(tmp_path, self.content()))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with Disk(self.open_again(tmp_path, writable=False)) as disk:
            disk.read(0, self.size)
            list(disk.extents())
        with Disk(self.open_again(tmp_path), writable=True) as disk:
            disk.read(0, self.size)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_events_are_told_to_the_sink(self, disk: Disk) -> None:
        events: list[str] = []
        disk.root.event_sink = events.append
        disk.write(0, b"x" * 512)
        disk.read(0, 512)
        disk.root.event_sink = None
        told = len(events)
        disk.read(0, 512)
        assert "read_aio" in events
        assert "write_aio" in events
        assert len(events) == told

    # -- allocation

    def test_disjoint_writes_into_one_new_unit_all_survive(self, overlay: Disk, layered: DiskModel) -> None:
        unit = self.unit_of(overlay.root)
        piece = max(1, unit // 8)
        for round_ in range(min(20, self.size // unit)):
            begin = round_ * unit
            jobs = []
            for index in range(min(8, unit)):
                data = bytes([round_ + 1, index + 1]) * piece
                jobs.append(partial(overlay.write, begin + index * piece, data[:piece]))
                layered.write(begin + index * piece, data[:piece])
            in_threads(jobs)
        layered.compare(overlay.read(0, self.size))

    def test_writes_zeroes_and_discards_of_threads_in_one_unit_do_not_mix(self, overlay: Disk) -> None:
        unit = self.unit_of(overlay.root)
        if not 2048 <= unit <= self.size // 4:
            pytest.skip("units too small to share, or too large for several")
        quarter = unit // 4
        for round_ in range(min(10, self.size // unit - 1)):
            begin = round_ * unit
            in_threads(
                [
                    partial(overlay.write, begin, b"w" * quarter),
                    partial(overlay.write_zeroes, begin + quarter, quarter),
                    partial(overlay.submit, [(WRITE_REQUEST, begin + 2 * quarter, b"s" * quarter)]),
                    partial(overlay.submit, [(ZERO_REQUEST, begin + 3 * quarter, 512), (DISCARD, begin + unit, unit)]),
                ]
            )
            found = overlay.read(begin, 3 * quarter + 512)
            compare(b"w" * quarter + bytes(quarter) + b"s" * quarter + bytes(512), found, f"unit {round_}")

    # -- over a backing file

    def test_what_is_not_allocated_shows_the_backing_file(self, overlay: Disk, layered: DiskModel) -> None:
        layered.compare(overlay.read(0, self.size))
        layered_rows = [row for batch in overlay.extents() for row in batch]
        assert all(row.depth == 1 for row in layered_rows if row.flags & DATA)
        own = [row for batch in overlay.extents(depth=1) for row in batch]
        assert not any(row.flags & DATA for row in own), "an empty overlay holds data"

    def test_partial_writes_copy_what_surrounds_them(self, overlay: Disk, layered: DiskModel, base: bytes) -> None:
        unit = self.unit_of(overlay.root)
        rng = random.Random(unit)
        offsets = [0, unit - 1, 3 * unit + 5, len(base) - 1, len(base), self.size - 512]
        offsets += [rng.randrange(self.size - 512) for _ in range(10)]
        for offset in offsets:
            offset %= self.size - 511
            data = rng.randbytes(rng.choice((1, 300, 512)))
            overlay.write(offset, data)
            layered.write(offset, data)
        layered.compare(overlay.read(0, self.size))

    @pytest.mark.parametrize("unmap", [False, True])
    def test_zeroes_hide_the_backing_file(self, overlay: Disk, layered: DiskModel, unmap: bool) -> None:
        unit = self.unit_of(overlay.root)
        for offset, length in (
            (unit, 2 * unit),
            (5 * unit + 100, 50),
            (7 * unit - 10, unit + 20),
            (self.size - 512, 512),
        ):
            offset, length = min(offset, self.size - 1), min(length, self.size - min(offset, self.size - 1))
            overlay.write_zeroes(offset, length, unmap=unmap)
            layered.write_zeroes(offset, length)
        layered.compare(overlay.read(0, self.size))

    def test_a_discard_never_exposes_the_backing_file(self, overlay: Disk, layered: DiskModel) -> None:
        if not overlay.root.capabilities.discard:
            pytest.skip(f"driver '{overlay.format}' does not discard")
        overlay.write(0, b"new" * 40_000)
        layered.write(0, b"new" * 40_000)
        for offset, length in ((0, 65536), (70_000, 100), (65536, 65536)):
            overlay.discard(offset, length)
            layered.discard(offset, length, overlay.read(offset, length))
        layered.compare(overlay.read(0, self.size))

    def test_growth_over_a_longer_base_reads_as_zeroes(self, tmp_path: Path, base: bytes) -> None:
        size = len(base) // 2 // 65536 * 65536
        node = self.make_overlay(tmp_path, MemoryNode(content=base), size)
        if not node.capabilities.resizable:
            graph.close_node(node)
            pytest.skip(f"driver '{node.driver}' cannot be resized")
        model = DiskModel(size, base)
        with Disk(node, writable=True) as disk:
            disk.resize(self.size)
            model.resize(self.size)
            model.compare(disk.read(0, self.size))
            disk.write(size + 1, b"x")
            model.write(size + 1, b"x")
            model.compare(disk.read(0, self.size), "the disk after a write behind its old end")
        self.check_image(tmp_path)

    def test_random_requests_over_a_backing_file(self, overlay: Disk, layered: DiskModel) -> None:
        unit = self.unit_of(overlay.root)
        rng = random.Random(unit + 1)
        for step in range(200):
            length = min(self.size, rng.choice((1, 512, unit, unit + 512, 3 * unit)))
            offset = rng.randrange(self.size - length + 1)
            if rng.random() < 0.6:
                offset -= offset % min(unit, 4096)
            action = rng.randrange(5)
            if action == 0:
                overlay.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                layered.write_zeroes(offset, length)
            elif action == 1 and overlay.root.capabilities.discard:
                overlay.discard(offset, length)
                layered.discard(offset, length, overlay.read(offset, length))
            elif action == 2:
                overlay.flush()
            else:
                data = rng.randbytes(length)
                overlay.write(offset, data)
                layered.write(offset, data)
            compare(layered.read(offset, length), overlay.read(offset, length), f"step {step} at {offset:#x}")
        layered.compare(overlay.read(0, self.size))
        self.check_map(overlay.root, 0, self.size)
        rows = [row for batch in overlay.extents(depth=1) for row in batch]
        assert all(row.flags & (ALLOCATED | ZERO) for row in rows if row.flags & DATA)

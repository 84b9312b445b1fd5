"""The state machine finds what is wrong with a disk, and nothing where nothing is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import Phase, settings, strategies as st
from hypothesis.stateful import run_state_machine_as_test

from cowhand.block.disk import Disk
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.buffers import Buffer
from cowhand.testing.machine import DiskMachine, Draw, machine_settings, pattern
from cowhand.testing.model import DiskModel, ModelMismatch


class MemoryMachine(DiskMachine):
    """A disk in memory; reopening takes a copy. Snapshots are copies of the node."""

    snapshots = True
    largest = 1 << 18
    kind = MemoryNode

    def create(self, draw: Draw) -> DiskModel:
        self.unit = draw(st.sampled_from((512, 4096)))
        content = pattern(1, draw(st.integers(1, 64)) * 512)
        self.image = self.kind(content=content)
        self.kept: dict[str, bytes] = {}
        self.examined = 0
        return DiskModel(len(content), content)

    def open(self, writable: bool = True) -> Disk:
        self.image = self.kind(content=self.image.snapshot_bytes())
        return Disk(self.image, writable=writable)

    def examine(self) -> None:
        self.examined += 1
        assert self.image.size == self.model.size

    def snapshot_create(self, name: str) -> None:
        self.kept[name] = self.image.snapshot_bytes()

    def snapshot_apply(self, name: str) -> None:
        self.live.close()
        self.disk = Disk(self.kind(content=self.kept[name]), writable=True)
        assert isinstance(self.disk.root, MemoryNode)
        self.image = self.disk.root

    def snapshot_delete(self, name: str) -> None:
        del self.kept[name]

    def snapshot_read(self, name: str) -> bytes:
        return self.kept[name]


TestMemory = MemoryMachine.TestCase
TestMemory.settings = machine_settings(examples=20, steps=30)


class LosesTheEnd(MemoryNode):
    """A write that crosses 16 KiB loses what lies behind."""

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        data = b"".join(buffers)
        super().write(offset, (data[: max(0, 16384 - offset)] if offset < 16384 else data,), fua)


class KeepsOldBytes(MemoryNode):
    """Growth shows what a longer disk once held."""

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        old = self.size
        super().resize(size, shrink=shrink)
        self.write(old, (b"\xaa" * (size - old),))


@pytest.mark.parametrize("broken", [LosesTheEnd, KeepsOldBytes])
def test_a_broken_disk_is_found(broken: type[MemoryNode]) -> None:
    class Machine(MemoryMachine):
        kind = broken

    unshrunk = settings(machine_settings(examples=50, steps=30), phases=[Phase.generate])
    with pytest.raises(ModelMismatch):
        run_state_machine_as_test(Machine, settings=unshrunk)

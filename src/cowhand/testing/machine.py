"""A state machine that drives a disk and its model with the same random steps (hypothesis); what differs is shrunk to the shortest story.

class Qcow2Machine(DiskMachine):
    def create(self, draw): ...
    def open(self, writable=True): ...

TestQcow2 = Qcow2Machine.TestCase
TestQcow2.settings = machine_settings(examples=20, steps=30)
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cowhand.block.disk import Disk
from cowhand.block.node.node import DISCARD, WRITE_REQUEST, ZERO_REQUEST, Request
from cowhand.testing.model import DiskModel

Draw = Callable[[st.SearchStrategy[Any]], Any]

#: Multiplies how many examples are tried: "10" for a night, "0.2" for a hurry.
SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))

_places = st.integers(0, (1 << 32) - 1)
_seeds = st.integers(0, 255)


def machine_settings(examples: int, steps: int) -> settings:
    """Return settings for a machine's test case: repeatable unless ``COWHAND_TEST_RANDOM`` is set, *examples* times the scale."""
    return settings(
        max_examples=max(1, int(examples * SCALE)),
        stateful_step_count=steps,
        derandomize="COWHAND_TEST_RANDOM" not in os.environ,
        database=None,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def pattern(seed: int, length: int) -> bytes:
    """Return *length* bytes that *seed* decides; seed 0 gives zeroes, as guests like to write them."""
    return random.Random(seed).randbytes(length) if seed else bytes(length)


class DiskMachine(RuleBasedStateMachine):
    """Random life of one disk. Subclasses say how it is made and opened, and what a sound image is.

    ``folder`` is an empty directory of the example. ``create`` sets ``unit``, around which offsets and lengths gather. Set ``snapshots`` and
    override the ``snapshot_*`` methods where the format has them.
    """

    snapshots = False
    largest = 1 << 20  #: no resize goes beyond

    # -- what a subclass says

    def create(self, draw: Draw) -> DiskModel:
        """Draw parameters, make the image in ``folder``, and return the model of its content."""
        raise NotImplementedError

    def open(self, writable: bool = True) -> Disk:
        """Open the image."""
        raise NotImplementedError

    def may_grow(self) -> bool:
        """Tell whether the disk can be made longer now."""
        return True

    def examine(self) -> None:
        """Assert that the flushed image is sound by other means: a check, another implementation. It may be open."""

    def snapshot_create(self, name: str) -> None:
        """Take an internal snapshot of the open disk."""
        raise NotImplementedError

    def snapshot_apply(self, name: str) -> None:
        """Go back to a snapshot of the open disk."""
        raise NotImplementedError

    def snapshot_delete(self, name: str) -> None:
        """Delete a snapshot of the open disk."""
        raise NotImplementedError

    def snapshot_read(self, name: str) -> bytes | None:
        """Return a snapshot's content, None where that cannot be read."""
        return None

    # -- life

    def __init__(self) -> None:
        super().__init__()
        # In memory where that is possible: thousands of flushes of a real disk take minutes and prove nothing here.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="cowhand-machine-", dir=memory))
        self.unit = 65536
        self.disk: Disk | None = None
        self.model = DiskModel(0)

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Make the image and open it."""
        self.model = self.create(data.draw)
        self.disk = self.open()

    def teardown(self) -> None:
        """Close, examine and compare a last time; leave nothing behind."""
        try:
            if self.disk is not None:
                self._close()
                self.examine()
                with self.open(writable=False) as disk:
                    self.model.compare(disk.read(0, disk.size), "the disk, opened again at the end,")
        finally:
            if self.disk is not None:
                self._close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _close(self) -> None:
        disk, self.disk = self.disk, None
        if disk is not None:
            disk.close()

    @property
    def live(self) -> Disk:
        """The open disk."""
        assert self.disk is not None
        return self.disk

    @invariant()
    def content_is_the_models(self) -> None:
        """After every step the disk reads as the model says."""
        if self.disk is not None:
            assert self.disk.size == self.model.size
            self.model.compare(self.disk.read(0, self.disk.size))

    # -- requests

    def _range(self, place: int, shape: int) -> tuple[int, int]:
        """Turn two drawn numbers into an offset and a length: around units, or anywhere."""
        unit, size = self.unit, self.model.size
        lengths = (unit, 512, 1, unit // 2, unit + 1, 3 * unit, unit - 1, 5 * unit + 700, 4096, 10_000)
        length = min(size, max(1, lengths[shape % len(lengths)]))
        offset = place % (size - length + 1)
        roundings = (unit, 512, 1, max(512, unit // 2))
        rounding = roundings[shape // len(lengths) % len(roundings)]
        return offset - offset % rounding, length

    shapes = st.integers(0, 39)

    @rule(place=_places, shape=shapes, seed=_seeds, fua=st.booleans())
    def write(self, place: int, shape: int, seed: int, fua: bool) -> None:
        """Write bytes anywhere."""
        offset, length = self._range(place, shape)
        data = pattern(seed, length)
        self.live.write(offset, data, fua=fua)
        self.model.write(offset, data)

    @rule(place=_places, shape=shapes, unmap=st.booleans())
    def write_zeroes(self, place: int, shape: int, unmap: bool) -> None:
        """Write zeroes anywhere."""
        offset, length = self._range(place, shape)
        self.live.write_zeroes(offset, length, unmap=unmap)
        self.model.write_zeroes(offset, length)

    @rule(place=_places, shape=shapes)
    def discard(self, place: int, shape: int) -> None:
        """Discard anywhere."""
        offset, length = self._range(place, shape)
        self.live.discard(offset, length)
        self.model.discard(offset, length, self.live.read(offset, length))

    @rule(places=st.lists(st.tuples(_places, shapes, _seeds, st.integers(0, 2)), max_size=8))
    def submit(self, places: list[tuple[int, int, int, int]]) -> None:
        """Submit a batch of requests that do not overlap."""
        taken: list[tuple[int, int]] = []
        batch: list[Request] = []
        for place, shape, seed, kind in places:
            offset, length = self._range(place, shape)
            if any(offset < end and begin < offset + length for begin, end in taken):
                continue
            taken.append((offset, offset + length))
            data = pattern(seed, length)
            batch.append(
                ((WRITE_REQUEST, offset, data), (ZERO_REQUEST, offset, length), (DISCARD, offset, length))[kind]
            )
        self.live.submit(batch)
        for kind, offset, what in batch:
            if kind == WRITE_REQUEST:
                self.model.write(offset, what)
            elif kind == ZERO_REQUEST:
                self.model.write_zeroes(offset, what)
            else:
                self.model.discard(offset, what, self.live.read(offset, what))

    @rule()
    def flush(self) -> None:
        """Flush."""
        self.live.flush()

    @rule()
    def reopen(self) -> None:
        """Close and open again."""
        self._close()
        self.disk = self.open()

    @rule()
    def look(self) -> None:
        """Flush and examine the image while it is open."""
        self.live.flush()
        self.examine()

    @precondition(lambda self: self.model.size < self.largest and self.may_grow())
    @rule(place=_places, rounding=st.sampled_from((512, 65536)))
    def grow(self, place: int, rounding: int) -> None:
        """Make the disk longer."""
        room = self.largest - self.model.size
        size = min(self.largest, -(-(self.model.size + place % room + 1) // rounding) * rounding)
        self.live.resize(size)
        self.model.resize(size)

    # -- snapshots

    @precondition(lambda self: self.snapshots and len(self.model.snapshots) < 5)
    @rule(number=st.integers(0, 99))
    def take_snapshot(self, number: int) -> None:
        """Take an internal snapshot."""
        name = f"s{number}"
        if name not in self.model.snapshots:
            self.snapshot_create(name)
            self.model.snapshot_create(name)

    def _chosen(self, number: int) -> str:
        return sorted(self.model.snapshots)[number % len(self.model.snapshots)]

    @precondition(lambda self: self.model.snapshots)
    @rule(number=_seeds)
    def apply_snapshot(self, number: int) -> None:
        """Go back to a snapshot."""
        name = self._chosen(number)
        self.snapshot_apply(name)
        self.model.snapshot_apply(name)

    @precondition(lambda self: self.model.snapshots)
    @rule(number=_seeds)
    def delete_snapshot(self, number: int) -> None:
        """Delete a snapshot."""
        name = self._chosen(number)
        self.snapshot_delete(name)
        self.model.snapshot_delete(name)

    @precondition(lambda self: self.model.snapshots)
    @rule(number=_seeds)
    def read_snapshot(self, number: int) -> None:
        """Read a snapshot without going back to it."""
        name = self._chosen(number)
        found = self.snapshot_read(name)
        if found is not None:
            DiskModel(len(found), self.model.snapshots[name]).compare(found, f"snapshot {name}")
            assert len(found) == len(self.model.snapshots[name])

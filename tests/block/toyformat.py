"""The smallest format that allocates: guest units anywhere in the file, the map in memory only. Its steps can be made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind, Reservation, Unprepared
from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode, Capabilities, Child, Role, Zeroing
from cowhand.block.node.options import NodeOptions
from cowhand.core.buffers import Buffer
from cowhand.core.errors import NotSupported
from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, IN_PLACE, NO_HOST, OFFSET, ZERO, ExtentBatch

_ZERO = -1


class ToyNode(FormatNode):
    """Units of ``unit`` bytes. ``hosts``: unit number → host offset, or -1 for zeroes. ``before`` is called at every step."""

    driver = "toy"
    supports_backing = True

    def __init__(
        self,
        file: BlockNode,
        size: int,
        *,
        unit: int = 4096,
        backing: BlockNode | None = None,
        zeroes: Zeroing = Zeroing.NATIVE,
        zero_kinds: Sequence[Kind] = (Kind.ZERO, Kind.ZERO_UNMAP, Kind.DISCARD, Kind.EMPTY),
        **options: Any,
    ) -> None:
        super().__init__(NodeOptions(read_only=False, **options))
        self._size = size
        self.allocation_unit = self.copy_unit = unit
        self.zero_kinds = zero_kinds
        self.capabilities = Capabilities(writable=True, zeroes=zeroes, discard=True, resizable=True)
        self.file = graph.attach(self, "file", file, Role.PRIMARY)
        if backing is not None:
            graph.attach(self, "backing", backing, Role.BACKING)
        self.hosts: dict[int, int] = {}
        self.packed: dict[int, tuple[int, int]] = {}
        self.next = 0
        self.steps: list[str] = []
        self.before: Callable[[str], None] = lambda step: None
        self.unprepared = 0  #: how often reserve asks for a preparation first
        self.one_unit_at_a_time = False

    @property
    def size(self) -> int:
        return self._size

    def _step(self, name: str) -> None:
        self.steps.append(name)
        self.before(name)

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        unit = self.allocation_unit
        number, within = divmod(offset, unit)
        have = min(length, unit - within)
        if number in self.packed:
            return have, DATA | ALLOCATED | COMPRESSED, self.file, number
        place = self.hosts.get(number)
        if place is None:
            return have, 0, None, NO_HOST
        if place == _ZERO:
            return have, ZERO | ALLOCATED, None, NO_HOST
        return have, DATA | ALLOCATED | OFFSET | IN_PLACE, self.file, place + within

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        out = ExtentBatch()
        end = offset + length
        while offset < end:
            have, flags, child, host = self.map(offset, end - offset)
            out.add(offset, have, flags, host, child.node if child else None)
            offset += have
        return out

    def begin_writing(self) -> None:
        self._step("begin")

    def reserve(self, offset: int, length: int, kind: Kind, nbytes: int = 0) -> Reservation | None:
        assert self.lock.locked()
        self._step(f"reserve {kind.name}")
        if self.unprepared:
            self.unprepared -= 1
            raise Unprepared(lambda: self._step("prepare"))
        unit = self.allocation_unit
        first = offset // unit
        count = 1 if self.one_unit_at_a_time or kind == Kind.COMPRESSED else -(-(offset + length) // unit) - first
        if kind == Kind.DATA:
            if self.hosts.get(first, _ZERO) != _ZERO:
                return None
            count = next((n for n in range(1, count) if self.hosts.get(first + n, _ZERO) != _ZERO), count)
        elif kind == Kind.COMPRESSED:
            if first in self.hosts:
                return None
        elif kind not in self.zero_kinds:
            raise NotSupported(f"the toy does not do {kind.name}")
        host = self.next
        if kind in (Kind.DATA, Kind.COMPRESSED):
            self.next += count * unit
        return Reservation(first * unit, count * unit, kind, self.file, host, fresh=True, state=nbytes)

    def link(self, reservation: Reservation) -> None:
        assert self.lock.locked()
        self._step("link")
        unit = self.allocation_unit
        for at in range(0, reservation.length, unit):
            number = (reservation.offset + at) // unit
            self.packed.pop(number, None)
            if reservation.kind == Kind.DATA:
                self.hosts[number] = reservation.host + at
            elif reservation.kind == Kind.COMPRESSED:
                self.packed[number] = (reservation.host, reservation.state)
            elif reservation.kind == Kind.EMPTY:
                self.hosts.pop(number, None)
            else:
                self.hosts[number] = _ZERO

    def abandon(self, reservation: Reservation) -> None:
        assert self.lock.locked()
        self._step("abandon")

    def decode(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        host, nbytes = self.packed[run[3]]
        payload = bytearray(nbytes)
        self.file.read_into(host, payload)
        within = offset % self.allocation_unit
        view[:] = (bytes(payload) * self.allocation_unit)[within : within + len(view)]

    def store(self, child: Child, host: int, offset: int, buffers: Sequence[Buffer]) -> None:
        self._step(f"store {offset}+{sum(map(len, buffers))}")
        super().store(child, host, offset, buffers)

    def flush(self) -> None:
        self._step("flush")
        self.file.flush()


class Interrupted(BaseException):
    """What a signal could raise anywhere."""


def at(step: str, action: Callable[[], object], times: int = 1) -> Callable[[str], None]:
    """Return a ``before`` that does *action* the first *times* that *step* comes."""
    lock, left = threading.Lock(), [times]

    def before(name: str) -> None:
        with lock:
            if name != step or not left[0]:
                return
            left[0] -= 1
        action()

    return before

"""The filter "throttle": requests wait until the limits of the node's throttle group let them pass.

Source: QEMU's ``docs/throttle.txt`` ("The 'throttle' block filter") and ``BlockdevOptionsThrottle``. Flushes and questions are not limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.filters.base import PassingFilter
from cowhand.block.filters.throttle import groups
from cowhand.block.node.node import READ, ZERO_REQUEST, Failures, Reopening, Request
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import Buffer
from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.filters.throttle.groups import Member
    from cowhand.block.opening.opening import Opening


class ThrottleOptions(NodeOptions):
    """Options of the filter."""

    throttle_group: str | None = option(help="name of the throttle group whose limits count")


class _Regrouping(Reopening):
    """Puts the node into another group, whose members it joins before it leaves those of the old one."""

    node: ThrottleNode

    def __init__(self, node: ThrottleNode, options: NodeOptions, writable: bool) -> None:
        assert isinstance(options, ThrottleOptions)
        assert options.throttle_group is not None
        super().__init__(node, options, writable)
        self._old = node.member
        self._other = groups.find(options.throttle_group).join()

    def _exchange(self) -> None:
        node, mine = self.node, self.node.member
        assert mine is not None
        for _ in range(mine.hurried):
            # Taken over, not copied: who hurried the node takes it back from the member that it has then.
            self._other.group.hurry(self._other, True)
            mine.group.hurry(mine, False)
        node.member, self._other = self._other, mine

    def commit(self) -> None:
        super().commit()
        self._exchange()

    def undo(self) -> None:
        super().undo()
        if self.node.member is not self._old:  # an interrupt may come before the commit
            self._exchange()

    def finish(self) -> None:
        self._other.group.leave(self._other)


class ThrottleNode(PassingFilter):
    """Holds requests back. While the graph is quiesced they pass at once, since whoever waits for their end would wait for the limit."""

    driver: ClassVar[str] = "throttle"
    options_class: ClassVar[type[NodeOptions]] = ThrottleOptions
    delays: ClassVar[bool] = True
    changeable: ClassVar[frozenset[str]] = frozenset(("throttle-group",))
    options: ThrottleOptions
    member: Member | None = None

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> ThrottleNode:
        assert isinstance(options, ThrottleOptions)
        if "file" not in given:
            raise InvalidArgument('A block device must be specified for "file"')
        if options.throttle_group is None:
            raise InvalidArgument("Please specify a throttle group")
        group = groups.find(options.throttle_group)
        node = super().open(opening, options, given)
        assert isinstance(node, ThrottleNode)
        node.member = group.join()
        return node

    def close(self) -> None:
        member, self.member = self.member, None
        if member is not None:
            member.group.leave(member)

    def prepare_reopen(self, options: NodeOptions, writable: bool) -> Reopening:
        return _Regrouping(self, options, writable)

    def hurry(self, on: bool) -> None:
        if self.member is not None:
            self.member.group.hurry(self.member, on)

    def _admit(self, write: bool, length: int) -> None:
        member = self.member
        assert member is not None
        member.group.admit(member, write, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self._admit(False, len(buffer))
        self.below.read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        self._admit(True, sum(len(buffer) for buffer in buffers))
        self.below.write(offset, buffers, fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self._admit(True, length)
        self.below.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self._admit(True, length)
        self.below.discard(offset, length)

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        # Each one is admitted by itself; what has passed goes down together.
        for kind, _, what in batch:
            length = what if kind >= ZERO_REQUEST else len(what)
            if length:
                self._admit(kind != READ, length)
        return self.below.submit(batch)

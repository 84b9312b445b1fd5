"""Throttle groups: nodes that share limits. Requests of a group's members take turns; those of one member pass in order.

Source: QEMU's ``docs/throttle.txt`` ("Applying I/O limits to groups of disks"), the object ``throttle-group``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from cowhand.block.filters.throttle.limits import Limits, Meter
from cowhand.core import clock
from cowhand.core.errors import InvalidArgument
from cowhand.core.locks import RANK_LEAF, RANK_REGISTRY, ranked_lock

#: Waits on the condition, at most so many seconds (None: until it is notified). Tests give one that moves their clock.
Wait = Callable[[threading.Condition, float | None], object]

_groups: dict[str, ThrottleGroup] = {}
_lock = ranked_lock(RANK_REGISTRY, "throttle groups")


def _wait(changed: threading.Condition, seconds: float | None) -> object:
    return changed.wait(seconds)


class Member:
    """One node's membership. ``hurried`` counts those who want its requests to pass at once (quiesce)."""

    def __init__(self, group: ThrottleGroup) -> None:
        self.group = group
        self.hurried = 0


class ThrottleGroup:
    """Limits and those that share them. Thread-safe. *now* and *wait* are the clock, for tests."""

    def __init__(
        self, name: str, limits: Limits, *, now: Callable[[], float] = clock.monotonic, wait: Wait = _wait
    ) -> None:
        self.name = name
        self.members: list[Member] = []
        self._now = now
        self._wait = wait
        self._changed = threading.Condition(ranked_lock(RANK_LEAF, "throttle group"))  # type: ignore[arg-type]
        self._meter = Meter(limits, now())
        #: For reads and for writes: members with requests that wait, whose turn it is first; and their requests, oldest first.
        self._queues: tuple[dict[Member, deque[object]], dict[Member, deque[object]]] = ({}, {})

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self._meter.limits

    def set_limits(self, limits: Limits) -> None:
        """Put other *limits* in force, for requests that wait too; the buckets are empty then."""
        with self._changed:
            self._meter = Meter(limits, self._now())
            self._changed.notify_all()

    def join(self) -> Member:
        """Return a new membership."""
        with self._changed:
            member = Member(self)
            self.members.append(member)
            return member

    def leave(self, member: Member) -> None:
        """End a membership whose requests have all passed."""
        with self._changed:
            self.members.remove(member)

    def hurry(self, member: Member, on: bool) -> None:
        """Let *member*'s requests pass without waiting until this was taken back as often as it was said."""
        with self._changed:
            # Never below nobody: an interrupt may come before everybody was told, and all are told of its end.
            member.hurried = max(0, member.hurried + (1 if on else -1))
            self._changed.notify_all()

    def admit(self, member: Member, write: bool, length: int) -> None:
        """Wait until a request of *length* bytes may pass."""
        with self._changed:
            if self._meter.idle:
                return
            queues = self._queues[write]
            ticket = object()
            queue = queues.setdefault(member, deque())
            queue.append(ticket)
            try:
                while not member.hurried:
                    turn = next(iter(queues.values()))[0] is ticket
                    seconds = self._meter.wait(write, self._now()) if turn else None
                    if seconds is not None and seconds <= 0:
                        break
                    self._wait(self._changed, seconds)
                self._meter.add(write, length)
            finally:
                queue.remove(ticket)
                del queues[member]
                if queue:
                    queues[member] = queue  # behind the others
                self._changed.notify_all()


def define(name: str, limits: Limits) -> ThrottleGroup:
    """Make the group *name*, in place of one of that name that nobody uses. Raises InvalidArgument when one is in use."""
    with _lock:
        known = _groups.get(name)
        if known is not None and known.members:
            raise InvalidArgument(
                f"throttle group '{name}' exists and is in use", qemu="A group with this name already exists"
            )
        group = _groups[name] = ThrottleGroup(name, limits)
        return group


def find(name: str) -> ThrottleGroup:
    """Return the group *name*. Raises InvalidArgument when there is none."""
    group = _groups.get(name)
    if group is None:
        raise InvalidArgument(f"Throttle group '{name}' does not exist")
    return group


def remove(name: str) -> None:
    """Forget the group *name*. Raises InvalidArgument when there is none, or it is in use."""
    with _lock:
        if find(name).members:
            raise InvalidArgument(
                f"throttle group '{name}' is in use", qemu=f"object '{name}' is in use, can not be deleted"
            )
        del _groups[name]

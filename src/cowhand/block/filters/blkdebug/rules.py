"""The rule engine of blkdebug, without I/O: events go in; states, errors and suspensions come out.

Source: QEMU's ``docs/devel/blkdebug.txt`` and, for names and defaults, ``BlkdebugEvent``, ``BlkdebugIOType`` and ``BlkdebugInjectErrorOptions``.

Theory of operation. The engine has a state, a number that begins as 1. Rules wait for an event. When an event happens, every rule of that
event acts whose state is 0 or the engine's: a set-state rule chooses the state that holds after the event; a suspend rule, which acts
once, halts the request that caused the event; the inject-error rules of the event together replace the *active* set. An active rule fails every
request of its kinds, and over its sector where it has one, until another event replaces the set, or once if it says so. So an error
stays in force long after its event. The newest rule is looked at first. The event "none" happens once, when the node is opened.
"""

from __future__ import annotations

import errno as _errno
from typing import NamedTuple

SECTOR = 512

EVENTS = (
    "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table", "l2_load", "l2_update",
    "l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write", "read_aio", "read_backing_aio", "read_compressed", "write_aio",
    "write_compressed", "vmstate_load", "vmstate_save", "cow_read", "cow_write", "reftable_load", "reftable_grow",
    "reftable_update", "refblock_load", "refblock_update", "refblock_update_part", "refblock_alloc", "refblock_alloc_hookup",
    "refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table", "refblock_alloc_switch_table",
    "cluster_alloc", "cluster_alloc_bytes", "cluster_free", "flush_to_os", "flush_to_disk", "pwritev_rmw_head",
    "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail", "pwritev", "pwritev_zero", "pwritev_done",
    "empty_image_prepare", "l1_shrink_write_table", "l1_shrink_free_l2_clusters", "cor_write", "cluster_alloc_space", "none",
)  # fmt: skip

IO_TYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
#: What a rule without an I/O type fails; asking where the holes are is only failed by name.
DEFAULT_IO_TYPES = frozenset(IO_TYPES) - {"block-status"}


class InjectError(NamedTuple):
    """Fail requests with ``errno`` after ``event``; ``sector`` limits it to requests that touch that sector."""

    event: str
    state: int = 0
    errno: int = _errno.EIO
    sector: int | None = None
    once: bool = False
    immediately: bool = False  #: accepted; a request that fails here has always failed at once
    io_types: frozenset[str] = DEFAULT_IO_TYPES

    def covers(self, io_type: str, offset: int, length: int) -> bool:
        """Tell whether the rule fails this request. A request without bytes touches no sector."""
        if io_type not in self.io_types:
            return False
        if self.sector is None:
            return True
        begin = self.sector * SECTOR
        return length > 0 and offset < begin + SECTOR and begin < offset + length


class SetState(NamedTuple):
    """Go to ``new_state`` when ``event`` happens."""

    event: str
    state: int = 0
    new_state: int = 0


class Suspend(NamedTuple):
    """Halt the request that causes ``event`` until somebody resumes ``tag``."""

    event: str
    tag: str
    state: int = 0


Rule = InjectError | SetState | Suspend


class Engine:
    """Rules and state. Not thread-safe: the node calls it under its lock."""

    def __init__(self) -> None:
        self.state = 1
        self._rules: dict[str, list[Rule]] = {}
        self._active: list[InjectError] = []

    def add(self, rule: Rule) -> None:
        """Add *rule*, to be looked at before the older ones."""
        self._rules.setdefault(rule.event, []).insert(0, rule)

    def remove_suspend(self, tag: str) -> bool:
        """Remove the breakpoints of *tag*; tell whether there was one."""
        found = False
        for rules in self._rules.values():
            kept = [rule for rule in rules if not (isinstance(rule, Suspend) and rule.tag == tag)]
            found |= len(kept) != len(rules)
            rules[:] = kept
        return found

    def happen(self, event: str) -> list[str]:
        """Let *event* happen and return the tags under which its request is to be suspended."""
        rules = self._rules.get(event)
        if not rules:
            return []
        state = new_state = self.state
        injected: list[InjectError] = []
        suspended: list[str] = []
        for rule in list(rules):
            if rule.state not in (0, state):
                continue
            if isinstance(rule, InjectError):
                injected.insert(0, rule)
            elif isinstance(rule, SetState):
                new_state = rule.new_state
            else:
                rules.remove(rule)
                suspended.append(rule.tag)
        if injected:
            self._active = injected
        self.state = new_state
        return suspended

    def error_of(self, io_type: str, offset: int, length: int) -> tuple[int, int]:
        """Return (errno with which a request is to fail, where it does), or (0, 0); a rule that acts once is gone then."""
        for rule in self._active:
            if rule.covers(io_type, offset, length):
                if rule.errno and rule.once:
                    self._active.remove(rule)
                    self._rules[rule.event].remove(rule)
                return rule.errno, max(offset, (rule.sector or 0) * SECTOR)
        return 0, 0

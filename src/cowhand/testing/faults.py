"""The fault node: fails, delays or suspends a chosen request, or cuts the power, so that a test can break every step of an operation.

A test runs an operation once to learn how many requests it makes (:attr:`FaultNode.counts`), then again for each *n* with
``fail(kind, n)``.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from cowhand.block.node.node import BlockNode
from cowhand.core.buffers import Buffer
from cowhand.core.errors import from_os_error
from cowhand.testing.wrapper import WrapperNode

READ, WRITE, ZERO, DISCARD, FLUSH, TRUNCATE = "read", "write", "zero", "discard", "flush", "truncate"
#: Every request that is not a read.
CHANGES = frozenset((WRITE, ZERO, DISCARD, FLUSH, TRUNCATE))
#: What can run out of space.
GROWTH = frozenset((WRITE, ZERO, TRUNCATE))

#: How much of a failing request reaches the node below all the same: nobody who gets an error can know.
NOTHING, HALF, ALL = 0.0, 0.5, 1.0


class Suspension:
    """One request that waits inside the node. ``reached`` is set when it has come; it goes on after :meth:`resume`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._resumed = threading.Event()

    def resume(self) -> None:
        """Let the request go on (or, when it has not come yet, pass)."""
        self._resumed.set()

    def stay(self, limit: float = 30.0) -> None:
        """Be the request: announce it and wait; gives up after *limit* seconds, so that a failed test ends."""
        self.reached.set()
        self._resumed.wait(limit)


class _Rule:
    __slots__ = ("action", "done", "kinds", "lasting", "nth", "seen")

    def __init__(
        self, kinds: frozenset[str], nth: int, action: int | float | Suspension, lasting: bool, done: float
    ) -> None:
        self.kinds = kinds
        self.nth = nth
        self.action = action
        self.lasting = lasting
        self.done = done
        self.seen = 0


class FaultNode(WrapperNode):
    """Passes everything on, but for what was arranged. Thread-safe; arrangements count requests from the moment they are made.

    *sector* is what the medium writes wholly or not at all, also when a request is done by half.
    """

    driver: ClassVar[str] = "fault"

    def __init__(self, inner: BlockNode, *, sector: int = 1, node_name: str | None = None) -> None:
        super().__init__(inner, node_name=node_name)
        self.limits = inner.limits._replace(request_alignment=max(sector, inner.limits.request_alignment))
        self.counts: Counter[str] = Counter()  #: requests by kind since the last :meth:`reset`
        self.kinds: list[str] = []  #: their kinds in order
        self.failed = 0  #: requests that were made to fail since then
        self.dead = False
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()

    # -- arranging

    def reset(self) -> None:
        """Forget every arrangement and counter; power comes back."""
        with self._lock:
            self._rules.clear()
            self.counts.clear()
            self.kinds.clear()
            self.failed = 0
            self.dead = False

    def fail(
        self,
        kinds: str | frozenset[str],
        nth: int = 1,
        error: int = errno.EIO,
        *,
        lasting: bool = False,
        done: float = NOTHING,
    ) -> None:
        """Fail the *nth* request of *kinds* from now, and with *lasting* all later ones; *done* of it is done before."""
        self._arrange(kinds, nth, error, lasting, done)

    def delay(self, kinds: str | frozenset[str], seconds: float, nth: int = 1, *, lasting: bool = False) -> None:
        """Let the *nth* request of *kinds* take *seconds* longer, before anything of it is done."""
        self._arrange(kinds, nth, float(seconds), lasting, NOTHING)

    def suspend(self, kinds: str | frozenset[str], nth: int = 1) -> Suspension:
        """Hold the *nth* request of *kinds* back, before anything of it is done, until the returned suspension is resumed."""
        suspension = Suspension()
        self._arrange(kinds, nth, suspension, False, NOTHING)
        return suspension

    def cut_power(self) -> None:
        """Fail every request from now on; nothing reaches the node below any more, not even by closing."""
        self.dead = True

    def _arrange(
        self, kinds: str | frozenset[str], nth: int, action: int | float | Suspension, lasting: bool, done: float
    ) -> None:
        chosen = kinds if isinstance(kinds, frozenset) else frozenset((kinds,))
        with self._lock:
            self._rules.append(_Rule(chosen, nth, action, lasting, done))

    # -- every request passes here

    def _meet(self, kind: str) -> _Rule | None:
        """Count a request; wait if that is arranged; return the rule by which it has to fail after its partial work, or raise."""
        failing: _Rule | None = None
        waits: list[float | Suspension] = []
        with self._lock:
            self.counts[kind] += 1
            self.kinds.append(kind)
            for rule in self._rules:
                if kind not in rule.kinds:
                    continue
                rule.seen += 1
                if rule.seen == rule.nth or (rule.lasting and rule.seen > rule.nth):
                    if isinstance(rule.action, int):
                        failing = failing or rule
                    else:
                        waits.append(rule.action)
        for wait in waits:
            if isinstance(wait, Suspension):
                wait.stay()
            else:
                time.sleep(wait)
        if self.dead:
            self._raise(kind, errno.EIO)
        if failing is not None and failing.done == NOTHING:
            self._raise(kind, failing.action)
        return failing

    def _raise(self, kind: str, number: int | float | Suspension) -> None:
        assert isinstance(number, int)
        with self._lock:
            self.failed += 1
        raise from_os_error(OSError(number, "injected"), self.filename, doing=kind)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        rule = self._meet(READ)
        super().read_into(offset, buffer)
        if rule is not None:
            self._raise(READ, rule.action)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        rule = self._meet(WRITE)
        if rule is None:
            super().write(offset, buffers, fua)
            return
        data = b"".join(buffers)
        part = self._share(len(data), rule)
        if part:
            super().write(offset, (data[:part],))
        self._raise(WRITE, rule.action)

    def _share(self, length: int, rule: _Rule | None) -> int:
        """Return how many of *length* bytes are done before *rule* fails the request."""
        block = self.limits.request_alignment
        return length if rule is None else int(length * rule.done) // block * block

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        rule = self._meet(ZERO)
        wanted = self._share(length, rule)
        if wanted:
            super().write_zeroes(offset, wanted, unmap=unmap, fallback=fallback, fua=fua)
        if rule is not None:
            self._raise(ZERO, rule.action)

    def discard(self, offset: int, length: int) -> None:
        rule = self._meet(DISCARD)
        wanted = self._share(length, rule)
        if wanted:
            super().discard(offset, wanted)
        if rule is not None:
            self._raise(DISCARD, rule.action)

    def flush(self) -> None:
        rule = self._meet(FLUSH)
        super().flush()
        if rule is not None:
            self._raise(FLUSH, rule.action)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        rule = self._meet(TRUNCATE)
        if rule is not None and rule.done == HALF:
            size = (self.size + size) // 2
        super().resize(size, preallocation=preallocation, shrink=shrink)
        if rule is not None:
            self._raise(TRUNCATE, rule.action)

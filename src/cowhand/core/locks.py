"""Locks with ranks: a thread takes them in rising rank only, so they cannot dead-lock.

In production :func:`ranked_lock` returns a plain ``threading.Lock``, which costs nothing. Under :func:`enforce` (tests call it before
anything is opened) it returns a lock that raises when it is taken out of order. ``docs/architecture.md`` lists the ranks.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Protocol

#: Ranks, outermost first. A thread that holds a lock may only take locks of a higher rank.
RANK_GRAPH = 10  #: shape of the graph: edges, permissions, quiesce
RANK_OPERATION = 20  #: one long metadata operation of a node at a time (snapshot, resize, check)
RANK_FLUSH = 30  #: one write-back of a node's metadata at a time
RANK_ALLOCATION = 40  #: a node's tables and reference counts in memory
RANK_SECTOR = 60  #: bytes of one node that belong together (an entry of a log): metadata is written under the two above
RANK_REGISTRY = 80  #: process-wide tables: image locks, drivers, buffer pools
RANK_LEAF = 90  #: held for a few instructions, takes nothing


class Lock(Protocol):
    """What a ranked lock offers: the part of ``threading.Lock`` that cowhand uses."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...
    def locked(self) -> bool: ...
    def __enter__(self) -> bool: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class LockOrderError(AssertionError):
    """A lock was taken out of order: a defect of the program, never of its input."""


class _Held(threading.local):
    def __init__(self) -> None:
        self.ranks: list[tuple[int, str]] = []


_held = _Held()
_enforced = False


def enforce(on: bool = True) -> None:
    """Make locks that are created from now on check their order (tests). Not thread-safe; call it first."""
    global _enforced
    _enforced = on


class _CheckedLock:
    __slots__ = ("_lock", "name", "rank")

    def __init__(self, rank: int, name: str) -> None:
        self._lock = threading.Lock()
        self.rank = rank
        self.name = name

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking and _held.ranks and max(_held.ranks)[0] > self.rank:
            raise LockOrderError(f"{self.name} (rank {self.rank}) taken while holding {_held.ranks}")
        if blocking and timeout == -1 and (self.rank, self.name + hex(id(self))) in _held.ranks:
            raise LockOrderError(f"{self.name} taken twice by one thread")
        got = self._lock.acquire(blocking, timeout)
        if got:
            _held.ranks.append((self.rank, self.name + hex(id(self))))
        return got

    def release(self) -> None:
        _held.ranks.remove((self.rank, self.name + hex(id(self))))
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.release()


def ranked_lock(rank: int, name: str) -> Lock:
    """Return a new lock of *rank*; *name* appears in the error when the order is broken under :func:`enforce`."""
    return _CheckedLock(rank, name) if _enforced else threading.Lock()

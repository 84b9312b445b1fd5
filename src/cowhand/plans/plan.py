"""What an operation would do, said before it is done: what would be read, written and moved, which files depend on it, and how it can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cowhand.plans.dependents import Dependents


@dataclass(frozen=True, slots=True)
class Touch:
    """A file that an operation reads or writes: ``what`` says which part or to what end, ``bytes`` how much (None: not known before)."""

    path: str
    what: str
    bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An operation that is not done yet. ``moves``: bytes of guest data that pass from file to file."""

    action: str
    reads: list[Touch] = field(default_factory=list)
    writes: list[Touch] = field(default_factory=list)
    moves: int = 0
    dependents: Dependents = field(default_factory=Dependents)
    warnings: list[str] = field(default_factory=list)
    undo: str = ""

    def document(self) -> dict[str, Any]:
        """Return the plan as ``--output json`` prints it."""
        return {
            "dry-run": True,
            "action": self.action,
            "reads": [_touch(item) for item in self.reads],
            "writes": [_touch(item) for item in self.writes],
            "moves": self.moves,
            **self.dependents.document(),
            "warnings": list(self.warnings),
            "undo": self.undo,
        }


def _touch(item: Touch) -> dict[str, Any]:
    return {"path": item.path, "what": item.what, "bytes": item.bytes}

"""What ``--dry-run`` says: what would be read, written and moved, which files depend on it, and how it can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cowhand.cli.output import Output
from cowhand.core.units import format_size


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
    dependents: list[str] = field(default_factory=list)
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
            "dependents": list(self.dependents),
            "warnings": list(self.warnings),
            "undo": self.undo,
        }


def _touch(item: Touch) -> dict[str, Any]:
    return {"path": item.path, "what": item.what, "bytes": item.bytes}


def _line(item: Touch) -> str:
    amount = f", {format_size(item.bytes)}" if item.bytes is not None else ""
    return f"{item.path} ({item.what}{amount})"


def show(plan: Plan, out: Output) -> int:
    """Print *plan* and return the exit code of a dry run."""
    if out.json:
        out.document(plan.document())
        return 0
    out.line(f"would {plan.action}; nothing was changed")
    rows: list[tuple[str, str]] = []
    rows += [("reads", _line(item)) for item in plan.reads]
    rows += [("writes", _line(item)) for item in plan.writes]
    rows.append(("moves", format_size(plan.moves) if plan.moves else "no data"))
    rows += [("depends on it", path) for path in plan.dependents]
    rows.append(("undo", plan.undo))
    out.facts(rows)
    for text in plan.warnings:
        out.warn(text)
    return 0

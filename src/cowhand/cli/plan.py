"""Printing a plan: what ``--dry-run`` says."""

from __future__ import annotations

from cowhand.cli.output import Output
from cowhand.core.units import format_size
from cowhand.plans.plan import Plan, Touch

__all__ = ["Plan", "Touch", "show"]


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
    found = plan.dependents
    rows += [("depends on it", name) for name in found.names()]
    rows += [("looked in", place) for place in found.looked]
    rows += [("not looked at", f"{path} ({reason})") for path, reason in found.missed]
    rows.append(("undo", plan.undo))
    out.facts(rows)
    for text in plan.warnings:
        out.warn(text)
    return 0

"""Printing a plan: what ``--dry-run`` says."""

from __future__ import annotations

import os
from dataclasses import replace

from cowhand.block.locking import device_use
from cowhand.cli.output import Output
from cowhand.core.units import format_size
from cowhand.image.create import local_path
from cowhand.plans.plan import Plan, Touch

__all__ = ["Plan", "Touch", "show"]


def _line(item: Touch) -> str:
    amount = f", {format_size(item.bytes)}" if item.bytes is not None else ""
    return f"{item.path} ({item.what}{amount})"


def _forbidden(plan: Plan) -> list[str]:
    """Return sentences on the files that would be written and may not be, and on folders in which none can be made."""
    found = []
    for path in dict.fromkeys(item.path for item in plan.writes):
        local = local_path(path)
        if local is None or not local:
            continue
        name = local if os.path.exists(local) else os.path.dirname(os.path.realpath(local)) or "."
        if os.path.exists(name) and not os.access(name, os.W_OK):
            reason = "the file system is mounted read-only" if _is_read_only(name) else "permission denied"
            found.append(f"{path} may not be written: {reason}")
    return found


def _in_use(plan: Plan) -> list[str]:
    """Return sentences on what would be written although the system uses it."""
    found = ((path, device_use.uses(path)) for path in dict.fromkeys(item.path for item in plan.writes))
    return [f"{path} is in use, and is not written without --force: {'; '.join(uses)}" for path, uses in found if uses]


def _is_read_only(path: str) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def show(plan: Plan, out: Output) -> int:
    """Print *plan*, and what would keep it from being done, and return the exit code of a dry run."""
    plan = replace(plan, warnings=[*plan.warnings, *_forbidden(plan), *_in_use(plan)])
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

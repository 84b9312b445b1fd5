"""``cowhand check`` where it repairs with an undo log, plans a repair, or undoes one. Not a command of its own."""

from __future__ import annotations

import argparse
import os
from itertools import count
from typing import TYPE_CHECKING

from cowhand.cli.commands import check
from cowhand.core.errors import InvalidArgument, NotSupported
from cowhand.core.units import format_size
from cowhand.image.create import local_path
from cowhand.image.repair import plan as rescue

if TYPE_CHECKING:
    from cowhand.cli.running import Context


def run(args: argparse.Namespace, context: Context) -> int:
    """Plan, repair or undo."""
    path = local_path(args.image)
    if path is None:
        raise NotSupported(
            f"'{args.image}' is not a file on this machine: a repair of it has no undo log",
            hint="Repair it with --no-log.",
        )
    if args.undo is not None:
        return _undo(args, context, path)
    if args.plan:
        return _plan(args, context, path)
    log = args.log or free_name(path)
    if os.path.lexists(log):
        raise InvalidArgument(f"'{log}' exists", hint="Choose another name for the undo log.")
    result, changed = rescue.repair_logged(path, args.repair, log, format=args.format)
    result.filename = args.image
    if result.failure is not None:
        if args.repair == "leaks" and result.failure.hint is None:
            result.failure.hint = (
                f"Lost space cannot be given back here before damage is repaired: cowhand check -r all {args.image} "
                f"({check.undo_words(args)})"
            )
        if changed:
            context.out.note(f"what was done can be undone: cowhand check --undo {log} {args.image}")
        raise result.failure.within("the check could not be completed")
    check.tell(args, context, result, log if changed else None)
    return check.exit_code(result)


def free_name(path: str) -> str:
    """Return ``PATH.undo``, or the first of ``PATH.undo.1``, ... that no file has."""
    names = (f"{path}.undo" + (f".{number}" if number else "") for number in count())
    return next(name for name in names if not os.path.lexists(name))


def _undo(args: argparse.Namespace, context: Context, path: str) -> int:
    if args.repair or args.plan:
        raise InvalidArgument("a repair is either done or undone", hint="Give --undo alone.")
    undone = rescue.undo_repair(args.undo, path, force=args.force, dry_run=args.dry_run)
    if args.dry_run:
        from cowhand.cli.plan import Plan, Touch, show

        plan = Plan(
            action=f"undo the repair of {args.image}", reads=[Touch(args.undo, "what was there before")],
            writes=[Touch(args.image, "what the repair changed")] if undone else [], undo=f"cowhand check -r all {args.image}",
            warnings=[] if undone else ["the image is as it was before the repair: there is nothing to undo"],
        )  # fmt: skip
        return show(plan, context.out)
    if context.out.json:
        context.out.document({"filename": args.image, "log": args.undo, "undone": undone})
    else:
        context.out.line(f"{args.image}: " + ("as it was before the repair" if undone else "nothing to undo"))
    return 0


def _plan(args: argparse.Namespace, context: Context, path: str) -> int:
    plan = rescue.plan_repair(path, args.repair or "all", format=args.format)
    result = plan.result
    result.filename = args.image
    if context.out.json:
        writes = [{"offset": row.offset, "length": row.length, "what": row.what} for row in plan.writes]
        failure = None if result.failure is None else str(result.failure)
        context.out.document(
            {**check.document(result), "dry-run": True, "writes": writes, "size-before": plan.size_before, "size": plan.size, "failure": failure}
        )  # fmt: skip
        return 0
    out = context.out
    check.tell_findings(args, context, result)
    if not plan.writes:
        out.line(f"{args.image}: a repair would write nothing")
        return 0
    out.line(
        f"would write {format_size(sum(row.length for row in plan.writes))} in {len(plan.writes)} places; nothing was changed"
    )
    out.table(
        ("offset", "length", "what lies there"),
        [(f"{r.offset:#x}", str(r.length), r.what) for r in plan.writes],
        right=(0, 1),
    )
    if plan.size != plan.size_before:
        out.line(f"the file would have {format_size(plan.size)} instead of {format_size(plan.size_before)}")
    if result.failure is not None:
        out.line(f"the repair would fail: {result.failure}")
    else:
        out.line(f"afterwards: {check.verdict(result)}")
    return 0

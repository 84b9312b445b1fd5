"""Give an image another backing file, or none. What it shows stays the same.

The rebase is refused, unless you insist with --force, if it would change what internal snapshots of the image show, or, with --unsafe, what other
images show that read through it. An image never becomes its own backing file, directly or through others.

What the new backing file would show differently is copied into the image first; the name in its header changes last, so a crash at any point
does no harm: the rebase is simply begun again. With --unsafe only the header changes.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from cowhand.cli import arguments
from cowhand.cli.guard import add_guard, guard_of
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand rebase -b base.qcow2 work.qcow2            base.qcow2 is the backing file from now on
  cowhand rebase --dry-run -b base.qcow2 work.qcow2  compare, and say how much would be copied
  cowhand rebase -b "" work.qcow2                    no backing file: copy everything that it showed
  cowhand rebase -u -b new/base.qcow2 work.qcow2     the backing file was moved: change its name alone
"""
WRITES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="overlay that gets another backing file")
    arguments.add_format(parser)
    parser.add_argument(
        "-b", "--base", metavar="BASE", required=True, help='the new backing file, relative to the image; "" for none'
    )
    parser.add_argument("-F", "--base-format", metavar="FMT", help="its format; detected if left out")
    parser.add_argument("-u", "--unsafe", action="store_true", help="change the header alone, whatever the files hold")
    parser.add_argument("-c", "--compress", action="store_true", help="store what is copied in compressed clusters")
    add_guard(parser, "rebase although snapshots of the image, or with -u other images, will show other data")
    arguments.add_share(parser)
    arguments.add_talk(parser)
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Rebase, or with ``--dry-run`` compare only."""
    from cowhand.jobs.rebase import rebase

    result = rebase(
        args.image,
        args.base,
        _format(args),
        format=args.format,
        unsafe=args.unsafe,
        look=args.dry_run,
        compressed=args.compress,
        force_share=args.force_share,
        progress=context.progress(f"{os.path.basename(args.image)} → {os.path.basename(args.base) or 'alone'}"),
        cancel=context.cancel,
        warn=context.out.warn,
        guard=guard_of(args, context),
    )
    if args.dry_run:
        from cowhand.cli.plan import show
        from cowhand.plans.rebase import plan_rebase

        guard = guard_of(args, context)
        plan = plan_rebase(
            args.image, args.base, args.base_format, result, format=args.format, unsafe=args.unsafe, guard=guard
        )
        return show(plan, context.out)
    if context.out.json:
        document = {
            "filename": args.image,
            "backing-filename": result.backing,
            "backing-filename-format": result.backing_format,
        }
        numbers = {"compared": result.compared, "copied": result.copied, "zeroes": result.zeroes}
        context.out.document({**document, **numbers})
        return 0
    where = f"now has the backing file {result.backing}" if result.backing else "has no backing file any more"
    context.out.line(f"{args.image} {where}; {format_size(result.copied + result.zeroes)} copied into it")
    return 0


def _format(args: argparse.Namespace) -> str | None:
    """Return the new backing file's format, which is recorded in the header: a later reader need not guess."""
    if args.base_format is not None or not args.base:
        given: str | None = args.base_format
        return given
    import cowhand
    from cowhand.block.opening.filenames import combine

    with cowhand.open(combine(args.image, args.base), backing=False, force_share=True) as disk:
        return disk.format

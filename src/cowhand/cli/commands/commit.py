"""Write an overlay's changes into the image below it, and empty the overlay, which then shows the base.

Every other overlay of that base would read changed bytes afterwards, and so would internal snapshots of the overlay itself. So images that
depend on the base are looked for: beside it and beside the overlay, below, in folders beside those, in known pools and on block devices
(--look-in names more folders). The commit is refused if there are any, or if not everything could be looked at; --force commits
anyway.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from cowhand.cli import arguments
from cowhand.cli.guard import add_guard, guard_of
from cowhand.core.units import format_size
from cowhand.image.info import chain_info

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand commit work.qcow2                     into its backing file
  cowhand commit --dry-run work.qcow2           what that would do, and to whom
  cowhand commit -b base.qcow2 work.qcow2       through all layers, down to base.qcow2
"""
WRITES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="overlay whose changes go down")
    arguments.add_format(parser)
    parser.add_argument(
        "-b", "--base", metavar="BASE", help="write into this image of the chain; the overlay is then not emptied"
    )
    parser.add_argument(
        "-d", "--no-empty", action="store_true", help="leave the overlay as it is: it is going to be deleted"
    )
    add_guard(parser, "commit although other images, or snapshots, will show other data")
    parser.add_argument(
        "-r", "--rate-limit", type=arguments.size, default=0, metavar="SIZE", help="bytes a second, at most"
    )
    parser.add_argument(
        "-t",
        "--cache",
        choices=arguments.CACHE_NAMES,
        metavar="MODE",
        default="writeback",
        help="how both images are written",
    )
    arguments.add_talk(parser)
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Commit, when nobody else needs the base as it is."""
    from cowhand.plans.commit import layers_to

    layers = layers_to(chain_info(args.image, format=args.format), args.base, args.image)
    names = [info.filename for info in layers]
    if args.dry_run:
        from cowhand.cli.plan import show
        from cowhand.plans.commit import plan_commit

        guard = guard_of(args, context)
        plan = plan_commit(args.image, args.base, format=args.format, drop=args.no_empty, guard=guard)
        return show(plan, context.out)
    from cowhand.jobs.commit import commit

    result = commit(
        args.image,
        args.base,
        format=args.format,
        drop=args.no_empty,
        rate_limit=args.rate_limit,
        cache=args.cache,
        progress=context.progress(f"{os.path.basename(names[0])} → {os.path.basename(names[-1])}"),
        cancel=context.cancel,
        warn=context.out.warn,
        guard=guard_of(args, context),
    )
    if context.out.json:
        document = {"filename": args.image, "base": result.base, "copied": result.copied, "zeroes": result.zeroes}
        context.out.document({**document, "base-grown": result.grown, "emptied": result.emptied})
        return 0
    text = f"committed {format_size(result.copied + result.zeroes)} into {result.base}"
    if result.grown:
        text += ", which grew"
    context.out.line(text + (f"; {args.image} is empty now" if result.emptied else ""))
    return 0

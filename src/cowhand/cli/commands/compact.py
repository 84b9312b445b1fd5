"""Make an image's file shorter in place: what lies at its end moves into the gaps before it.

What the guest sees, the snapshots and the bitmaps stay as they are. It may be interrupted at any time, and goes on when it is called again.
Compressed clusters are packed anew, and the image's tables move too. Of an image with a data file only the tables move.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cowhand.cli import arguments
from cowhand.cli.several import run_each
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand compact --dry-run disk.qcow2   what would be gained, and moved
  cowhand compact disk.qcow2
"""
WRITES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="image to compact; no other program may have it open")
    arguments.add_format(parser)
    arguments.add_talk(parser)
    arguments.add_dry_run(parser)
    parser.add_argument(
        "--force", action="store_true", help="write although the system uses the image (a mounted device)"
    )
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Compact one image after the other."""
    images: list[str] = args.image
    return run_each(images, context, lambda image: _run(argparse.Namespace(**{**vars(args), "image": image}), context))


def _run(args: argparse.Namespace, context: Context) -> int:
    from cowhand.image.compact import compact

    progress = None if args.dry_run else context.progress(f"compacting {args.image}")
    done = compact(args.image, format=args.format, dry_run=args.dry_run, progress=progress, cancel=context.cancel)
    gained = done.size_before - done.size
    if args.dry_run:
        from cowhand.cli.plan import Plan, Touch, show

        plan = Plan(
            action=f"compact {args.image} from {format_size(done.size_before)} to {format_size(done.size)}",
            reads=[Touch(args.image, "all tables")],
            writes=[Touch(args.image, "clusters that move, and what refers to them", done.moved)] if gained else [],
            moves=done.moved,
            undo="not needed: no content changes",
        )
        return show(plan, context.out)
    if context.out.json:
        context.out.document(
            {"filename": args.image, "size-before": done.size_before, "size": done.size, "moved": done.moved, "leaks-fixed": done.leaked}
        )  # fmt: skip
    else:
        words = f"{format_size(gained)} shorter, {format_size(done.moved)} moved" if gained else "nothing to gain"
        context.out.line(f"{args.image}: {words}; {format_size(done.size)} long")
    return 0

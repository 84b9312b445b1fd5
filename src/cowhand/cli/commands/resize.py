"""Make a disk longer or shorter. What is added reads as zeroes.

SIZE is the new length, or with + or - the difference. Shrinking cuts data off the disk's end, so it needs --shrink:
shrink the file systems and partitions inside first.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

import cowhand
from cowhand.cli import arguments
from cowhand.cli.guard import add_guard, guard_of
from cowhand.core.errors import InvalidArgument
from cowhand.core.units import format_size, parse_size

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand resize disk.qcow2 20G
  cowhand resize disk.qcow2 +5G
  cowhand resize --shrink disk.qcow2 10G
"""
WRITES = True
PREALLOCATION = ("off", "metadata", "falloc", "full")
SECTOR = 512


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="image whose disk is resized")
    parser.add_argument("size", metavar="[+|-]SIZE", help="new length, or the difference")
    arguments.add_format(parser)
    parser.add_argument("--shrink", action="store_true", help="allow data at the end to be cut off")
    parser.add_argument("--preallocation", choices=PREALLOCATION, default="off", help="how the new space is prepared")
    add_guard(parser, "shrink although other images read through this one")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def new_size(text: str, old: int) -> int:
    """Return the length that *text* asks for, up to whole sectors; raises InvalidArgument."""
    sign = text[0] if text.startswith(("+", "-")) else ""
    amount = parse_size(text[len(sign) :])
    size = old + amount if sign == "+" else old - amount if sign == "-" else amount
    if size < 0:
        raise InvalidArgument(f"the disk has {format_size(old)}, less than the {format_size(amount)} to be cut off")
    if size == old and sign:
        raise InvalidArgument("the difference is zero")
    return -(-size // SECTOR) * SECTOR


def run(args: argparse.Namespace, context: Context) -> int:
    """Resize the disk."""
    if re.match(r"-\.?\d", args.image):  # resize -1G disk.qcow2
        args.image, args.size = args.size, args.image
    with cowhand.open(args.image, format=args.format, writable=not args.dry_run) as disk:
        old = disk.size
        size = new_size(args.size, old)
        if size < old and not args.shrink and not args.dry_run:
            raise InvalidArgument(
                f"the last {format_size(old - size)} of the disk would be lost",
                path=args.image,
                hint="Shrink the file systems and partitions inside first, then insist with --shrink.",
            )
        if args.dry_run:
            from cowhand.cli.guard import dependents
            from cowhand.cli.plan import show
            from cowhand.plans.resize import plan_resize

            return show(plan_resize(args.image, old, size, dependents(args.image, args)), context.out)
        disk.guard = lambda: guard_of(args, context)
        if size != old:
            disk.resize(size, preallocation=args.preallocation, shrink=args.shrink)
            disk.flush()
    if context.out.json:
        context.out.document({"filename": args.image, "virtual-size": size, "previous-size": old})
    elif size == old:
        context.out.line(f"{args.image} has {format_size(size)} already")
    else:
        context.out.line(f"resized {args.image} from {format_size(old)} to {format_size(size)}")
    return 0

"""Show how much space an image of a disk would need: for the data it has now, and when all of it is written.

Nothing is written. Give an image, or with --size the length of a disk that does not exist yet.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cowhand.cli import arguments
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand measure -O qcow2 disk.raw                       for a copy of disk.raw
  cowhand measure -O qcow2 --size 100G                    for a new disk
  cowhand measure -O qcow2 -l before-upgrade disk.qcow2   for a copy of one snapshot
"""
WRITES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", help="image that would be copied")
    parser.add_argument("--size", type=arguments.size, help="length of a disk that does not exist yet")
    arguments.add_format(parser)
    parser.add_argument("-O", "--target-format", metavar="FMT", default="raw", help="format of the new image (raw)")
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE,...", help="options of the new image"
    )
    parser.add_argument("-l", "--snapshot", metavar="NAME", help="measure the disk as it was at this snapshot")
    arguments.add_share(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Measure."""
    from cowhand.copy.ops.measure import measure

    if (args.image is None) == (args.size is None):
        raise arguments.Usage("give either an image or --size", hint="See: cowhand measure --help")
    result = measure(
        args.image,
        args.target_format,
        size=args.size,
        options=arguments.driver_options(args.option),
        source_format=args.format,
        snapshot=args.snapshot,
        force_share=args.force_share,
    )
    if context.out.json:
        document: dict[str, Any] = {"required": result.required, "fully-allocated": result.fully_allocated}
        if result.bitmaps is not None:
            document["bitmaps"] = result.bitmaps
        if result.bitmaps_problem:
            document |= {"bitmaps": None, "bitmaps-problem": result.bitmaps_problem}
        context.out.document(document)
        return 0
    rows = [("required", _amount(result.required)), ("fully allocated", _amount(result.fully_allocated))]
    if result.bitmaps:
        rows.append(("bitmaps", _amount(result.bitmaps)))
    if result.bitmaps_problem:
        rows.append(("bitmaps", f"unreadable: {result.bitmaps_problem}"))
    context.out.facts(rows)
    return 0


def _amount(count: int) -> str:
    return f"{format_size(count)} ({count} bytes)"

"""Show what the space in an image's file is used for.

Every byte of the file is one of: header, tables, data that the disk holds now, compressed data, what only internal snapshots hold, dirty
bitmaps, reference counts, leaked (counted as used, but nothing refers to it: "check --repair leaks" gives it back) and free (gaps that the
next writes fill; "compact" makes the file shorter by them).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cowhand.cli import arguments
from cowhand.cli.several import Codes, each
from cowhand.core.units import format_size
from cowhand.image.usage import ImageUsage, chain_usage, image_usage

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand du disk.qcow2
  cowhand du --chain top.qcow2            every image below it, too
  cowhand du --bytes --output json *.qcow2
"""
WRITES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="image to look into")
    arguments.add_format(parser, "the images")
    parser.add_argument("--chain", action="store_true", help="show its backing files, too")
    parser.add_argument("--bytes", action="store_true", help="show exact numbers of bytes")
    arguments.add_share(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Show it."""
    codes = Codes()
    found = each(args.image, context, lambda name: _usage(name, args), codes)
    images = [one for chain in found for one in chain]
    if context.out.json:
        context.out.document([one.document() for one in images])
    else:
        for index, one in enumerate(images):
            if index:
                context.out.line()
            _show(one, args, context)
    if any(one.problem for one in images):
        codes.add(1)
    return codes.worst


def _usage(name: str, args: argparse.Namespace) -> list[ImageUsage]:
    if args.chain:
        return chain_usage(name, format=args.format, force_share=args.force_share)
    return [image_usage(name, format=args.format, force_share=args.force_share)]


def _show(one: ImageUsage, args: argparse.Namespace, context: Context) -> None:
    out = context.out
    if one.problem:
        out.line(f"{one.filename}: {one.problem}")
        return
    amount = str if args.bytes else format_size
    medium = f", {amount(one.disk_size)} on its medium" if one.disk_size is not None else ""
    out.line(f"{one.filename}: {one.format}, {amount(one.file_size)} long{medium}")
    rows = [
        (kind, amount(value), f"{100 * value / one.file_size:.1f} %" if one.file_size else "")
        for kind, value in one.parts.items()
        if value
    ]
    out.table(("for", "size", "share"), rows, right=(1, 2))
    if one.data_file is not None:
        name, length, actual = one.data_file
        medium = f", {amount(actual)} on its medium" if actual is not None else ""
        out.line(f"data lies in {name}: {amount(length)} long{medium}")
    if one.uncertain and one.parts.get("leaked"):
        out.warn(f"{one.filename} is being written, or was not closed: what seems leaked may be in use")

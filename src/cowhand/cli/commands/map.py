"""Show where the data of a disk lies: in which image of its chain, compressed or not, zeroes, or never written.

On a terminal the disk is drawn as a bar; elsewhere, or with --extents, each stretch is a line. --svg makes a picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import cowhand
from cowhand.block.graph.block_status import skip_filters
from cowhand.cli import arguments
from cowhand.core.errors import OutOfRange
from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, NO_HOST, OFFSET, ZERO, Extent, ExtentBatch, merged
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand map disk.qcow2                     draw it
  cowhand map --extents disk.qcow2           list every stretch
  cowhand map --output json disk.qcow2       the same for programs
  cowhand map --svg disk.svg disk.qcow2      a picture for the browser
"""
WRITES = False

#: IN_PLACE and the like make no difference to what is shown.
_SHOWN = DATA | ZERO | ALLOCATED | OFFSET | COMPRESSED


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="image to look at, through its whole chain")
    arguments.add_format(parser)
    parser.add_argument("-s", "--start-offset", type=arguments.size, default=0, metavar="OFFSET", help="begin there")
    parser.add_argument("-l", "--max-length", type=arguments.size, metavar="LENGTH", help="look at so many bytes only")
    view = parser.add_mutually_exclusive_group()
    view.add_argument("--bar", action="store_true", help="draw the bar even if standard output is not a terminal")
    view.add_argument("--extents", action="store_true", help="list every extent, even on a terminal")
    arguments.add_picture(parser)
    arguments.add_share(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Show the map of the disk."""
    with cowhand.open(args.image, format=args.format, force_share=args.force_share) as disk:
        if args.start_offset > disk.size:
            raise OutOfRange(f"the disk ends at {disk.size}, before {args.start_offset}", path=args.image)
        rest = disk.size - args.start_offset
        length = rest if args.max_length is None else min(rest, args.max_length)
        batches = _watched(disk.extents(args.start_offset, length), context)
        if args.svg is not None:
            return _picture(args, disk, batches, context)
        if context.out.json:
            return _json(batches)
        if args.bar or (context.out.rich and not args.extents):
            return _bar(args, disk, batches, context)
        return _lines(batches)


def _watched(batches: Iterator[ExtentBatch], context: Context) -> Iterator[ExtentBatch]:
    for batch in batches:
        context.cancel.check()
        yield batch


def layer_names(disk: Disk) -> list[str]:
    """Return the names of the images of the disk's chain, without their folders, the active one first."""
    import os

    names = []
    node = skip_filters(disk.root)
    while True:
        names.append(os.path.basename(node.filename) or node.filename)
        below = node.backing
        if below is None:
            return names
        node = skip_filters(below.node)


def row_document(row: Extent) -> dict[str, Any]:
    """Return one stretch with the keys of ``qemu-img map --output json``, and the file that holds it."""
    flags = row.flags
    document: dict[str, Any] = {
        "start": row.start,
        "length": row.length,
        "depth": row.depth,
        "present": bool(flags & ALLOCATED),
        "zero": bool(flags & ZERO),
        "data": bool(flags & DATA),
        "compressed": bool(flags & COMPRESSED),
    }
    if flags & OFFSET and row.host != NO_HOST:
        document["offset"] = row.host
        document["filename"] = row.node.filename
    return document


def _json(batches: Iterator[ExtentBatch]) -> int:
    import json

    # One object a line, and none kept: a map may have millions of rows. What many rows have in common is written once.
    alike: dict[tuple[int, int], tuple[str, str]] = {}
    before, write = "[\n", sys.stdout.write
    for row in merged(batches, _SHOWN):
        start, length, flags, host, node, depth = row
        parts = alike.get((flags, id(node)))
        if parts is None:
            words = json.dumps(row_document(Extent(0, 0, flags, 0, node, 0)))
            middle, mark, end = words.partition('"offset": 0')
            parts = middle.removeprefix('{"start": 0, "length": 0, "depth": 0') + mark[:-1], end
            alike[flags, id(node)] = parts
        place = host if flags & OFFSET else ""
        write(f'{before}{{"start": {start}, "length": {length}, "depth": {depth}{parts[0]}{place}{parts[1]}')
        before = ",\n"
    write("[]\n" if before == "[\n" else "\n]\n")
    return 0


def kind_word(flags: int) -> str:
    """Return what lines say of an extent with *flags*."""
    if flags & ZERO:
        return "zero" if flags & ALLOCATED else "unallocated"
    if flags & DATA:
        return "compressed" if flags & COMPRESSED else "data"
    return "unallocated"


def _lines(batches: Iterator[ExtentBatch]) -> int:
    from cowhand.cli.output import printable

    sys.stdout.write(f"{'start':>18}  {'length':>18}  {'kind':11}  {'layer':>5}  {'offset':>18}  file\n")
    for row in merged(batches, _SHOWN):
        place = f"{row.host:#18x}  {printable(row.node.filename)}" if row.flags & OFFSET else ""
        line = f"{row.start:#18x}  {row.length:#18x}  {kind_word(row.flags):11}  {row.depth:5}  {place}"
        sys.stdout.write(line.rstrip() + "\n")
    return 0


def _bar(args: argparse.Namespace, disk: Disk, batches: Iterator[ExtentBatch], context: Context) -> int:
    from cowhand.cli.bar import draw, raster_for

    raster = raster_for(disk.size, context.out).add_batches(batches)
    context.out.line(f"{args.image}: {disk.format}, {format_size(disk.size)}")
    context.out.line()
    draw(raster, layer_names(disk), context.out)
    return 0


def _picture(args: argparse.Namespace, disk: Disk, batches: Iterator[ExtentBatch], context: Context) -> int:
    from cowhand.cli.picturefile import write_picture
    from cowhand.cli.pictures.disk import picture

    layers = layer_names(disk)
    below = f" over {len(layers) - 1} more" if len(layers) > 1 else ""
    subtitle = f"{disk.format}{below} · disk of {format_size(disk.size)}"
    stored = disk.root.allocated_size()
    if stored is not None:
        subtitle += f" · {format_size(stored)} on disk"
    text = picture(batches, disk.size, title=layers[0], subtitle=subtitle, layers=layers, theme=args.theme)
    write_picture(args.svg, text, context)
    return 0

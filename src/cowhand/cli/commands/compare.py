"""Check whether two disks hold the same bytes. Formats and sizes may differ: past its end a disk counts as zeroes.

With --strict the sizes, and what is allocated, have to be the same too. The exit code is 0 when they are the same, 6 when not.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cowhand.cli import arguments

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand compare disk.raw disk.qcow2
  cowhand compare -f raw -F qcow2 disk.img copy.qcow2
"""
WRITES = False
EXIT_DIFFERENT = 6


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="one image")
    parser.add_argument("second", help="the other one")
    arguments.add_format(parser, "the first image")
    parser.add_argument("-F", "--second-format", metavar="FMT", help="format of the second image")
    parser.add_argument("-s", "--strict", action="store_true", help="sizes and allocation have to be the same, too")
    parser.add_argument(
        "-T", "--cache", choices=arguments.CACHE_NAMES, metavar="MODE", default="writeback", help="cache of both images"
    )
    arguments.add_talk(parser)
    arguments.add_share(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Compare."""
    from cowhand.copy.ops.compare import Difference, compare

    found = compare(
        args.first,
        args.second,
        first_format=args.format,
        second_format=args.second_format,
        strict=args.strict,
        cache=args.cache,
        force_share=args.force_share,
        progress=context.progress("comparing"),
        cancel=context.cancel,
    )
    if context.out.json:
        context.out.document(
            {
                "identical": found.identical,
                "reason": found.reason.value if found.reason is not None else None,
                "offset": found.offset,
                "sizes-differ": found.sizes_differ,
            }
        )
    elif found.identical:
        context.out.line(
            "the disks are the same"
            + (", except for zeroes at the end of the longer one" if found.sizes_differ else "")
        )
    else:
        words = {"content": "the bytes differ", "status": "what is allocated differs", "size": "the sizes differ"}
        reason = words[found.reason.value] if found.reason is not None else "they differ"
        text = reason + (f" at {found.offset:#x} ({found.offset})" if found.offset is not None else "")
        if found.sizes_differ and found.reason is not Difference.SIZE:
            text += "; the sizes differ, too"
        context.out.line(text)
    return 0 if found.identical else EXIT_DIFFERENT

"""Make an image that has no backing file any more: the image itself, or a new one beside it.

Without TARGET what the image shows of its backing files is copied into it, and then the name of the backing file is taken out of its header. It
shows the same content at every moment; after a crash the command is simply given again. The backing files are not changed. With TARGET
the image stays as it is, and a new one is made, which appears when it is complete.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cowhand.cli import arguments
from cowhand.cli.guard import add_guard
from cowhand.image.info import image_info

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand flatten work.qcow2                 work.qcow2 needs no other file from now on
  cowhand flatten --dry-run work.qcow2       how much would be copied
  cowhand flatten -c work.qcow2 alone.qcow2  a new image, compressed; work.qcow2 stays
"""
WRITES = True
#: Options that are handed on to convert where there is a target.
_HANDED_ON = ("compress", "overwrite", "verify", "progress", "quiet", "force_share", "force", "dry_run")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="image that has a backing file")
    parser.add_argument("target", nargs="?", help="new image to make; the image itself is changed if left out")
    arguments.add_format(parser)
    parser.add_argument(
        "-O", "--target-format", metavar="FMT", help="format of the new image; the image's own if left out"
    )
    parser.add_argument("-c", "--compress", action="store_true", help="store what is copied in compressed clusters")
    parser.add_argument("--overwrite", action="store_true", help="replace what has the target's name")
    parser.add_argument("--verify", action="store_true", help="compare both when the new image is made")
    add_guard(parser, "although internal snapshots of the image will show other data, or other images the target's")
    arguments.add_share(parser)
    arguments.add_talk(parser)
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Flatten."""
    info = image_info(args.image, format=args.format, force_share=True)
    if args.target is not None:
        return _into_new(args, context, info.format)
    for option in ("target_format", "overwrite", "verify"):
        if getattr(args, option):
            raise arguments.Usage(
                f"--{option.replace('_', '-')} is for a new image", hint="cowhand flatten IMAGE TARGET"
            )
    if info.backing is None:
        if context.out.json:
            context.out.document(
                {"filename": args.image, "backing-filename": None, "backing-filename-format": None}
                | {"compared": 0, "copied": 0, "zeroes": 0}
            )
        else:
            context.out.line(f"{args.image} has no backing file: nothing to do")
        return 0
    from cowhand.cli.commands import rebase

    return rebase.run(argparse.Namespace(**{**vars(args), "base": "", "base_format": None, "unsafe": False}), context)


def _into_new(args: argparse.Namespace, context: Context, format: str) -> int:
    from cowhand.cli.commands import convert
    from cowhand.cli.main import build_parser

    words = ["-O", args.target_format or format, "--output", args.output, "-f", format]
    words += [f"--{name.replace('_', '-')}" for name in _HANDED_ON if getattr(args, name)]
    words += [word for folder in args.look_in for word in ("--look-in", folder)]
    return convert.run(build_parser("convert", convert).parse_args([*words, "--", args.image, args.target]), context)

"""Make a new image: empty, or as an overlay that stores only what differs from a base.

The size may be left out when there is a base: it is the base's then. Without -f the format is what the name ends with
(.qcow2), or raw. An existing image is never overwritten unless you insist with --overwrite.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cowhand.cli import arguments
from cowhand.cli.guard import add_guard
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from cowhand.cli.running import Context
    from cowhand.image.create import Creation

EXAMPLES = """\
  cowhand create -f qcow2 disk.qcow2 10G                       an empty disk
  cowhand create -f qcow2 -b base.qcow2 -F qcow2 work.qcow2    an overlay over base.qcow2
  cowhand create -f qcow2 -o cluster_size=128k,compat=1.1 disk.qcow2 1T
  cowhand create --encrypt -f qcow2 disk.qcow2 10G             asks for the new passphrase
  cowhand create -f qcow2 -o help                              what a format takes
"""
WRITES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", help="file to make")
    parser.add_argument("size", nargs="?", help="length of the disk, such as 512M or 10G")
    parser.add_argument("-f", "--format", metavar="FMT", help="format of the new image")
    parser.add_argument(
        "-b", "--backing", metavar="BASE", help="make an overlay of BASE (looked up beside the new image)"
    )
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="format of BASE")
    parser.add_argument(
        "-u",
        "--unsafe",
        action="store_true",
        help="do not open BASE: it need not exist yet, and the size must be given",
    )
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE,...", help="the format's options, or help"
    )
    arguments.add_encrypt(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what has that name")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")
    add_guard(parser, "overwrite although other images read through what is there")
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Make the image that *args* describe."""
    format = arguments.format_for(args.image or "", args.format)
    if any(text in ("help", "?") for text in args.option):
        return _explain(args.format or "qcow2", context)
    if args.image is None:
        raise arguments.Usage("the new image needs a name", hint="See: cowhand create --help")
    from cowhand.cli.guard import guard_of, refuse_existing, tidy
    from cowhand.image.create import prepare

    creation = prepare(
        args.image,
        format,
        args.size,
        _options(args, format),
        backing=args.backing,
        backing_format=args.backing_format,
        open_backing=not args.unsafe,
    )
    there = refuse_existing(args.image, args.overwrite)
    tidy(context, args.image, remove=not args.dry_run)
    if args.dry_run:
        creation.refuse_loop(force=args.force)
        return _plan(args, context, creation, there)
    creation.run(overwrite=args.overwrite, warn=context.out.warn, guard=guard_of(args, context))
    if context.out.json:
        context.out.document(_document(creation))
        return 0
    text = f"created {creation.filename}: {creation.format.name}, {format_size(creation.size)}"
    if args.backing:
        text += f", over {args.backing}"
    context.out.line(text)
    return 0


def _options(args: argparse.Namespace, format: str) -> dict[str, str]:
    given = arguments.driver_options(args.option)
    if not args.encrypt:
        return given
    from cowhand.cli.secrets import creation_options

    return creation_options(args, format, given)


def _document(creation: Creation) -> dict[str, Any]:
    return {
        "filename": creation.filename,
        "format": creation.format.name,
        "virtual-size": creation.size,
        "options": {name: value for name, value in creation.options.items() if name != "size"},
    }


def _plan(args: argparse.Namespace, context: Context, creation: Creation, there: bool) -> int:
    from cowhand.cli.guard import dependents, in_place_warning
    from cowhand.cli.plan import Plan, Touch, show
    from cowhand.plans.dependents import Dependents

    plan = Plan(
        action=f"create {creation.filename}, {creation.format.name}, {format_size(creation.size)}",
        reads=[Touch(args.backing, "header of the base")] if args.backing and not args.unsafe else [],
        writes=[
            Touch(
                creation.filename,
                "its present content would be lost when the new image is complete" if there else "new file",
            )
        ],
        warnings=in_place_warning(creation.filename, backing=args.backing) if there else [],
        dependents=dependents(args.image, args) if there else Dependents(),
        undo="none: what the file holds now would be gone" if there else f"delete {creation.filename}",
    )
    return show(plan, context.out)


def _explain(format: str, context: Context) -> int:
    from cowhand.block.node.create_options import FILE_OPTIONS, merge
    from cowhand.drivers import REGISTRY
    from cowhand.image.create import create_options_of

    known = merge(create_options_of(REGISTRY.get(format)), FILE_OPTIONS).values()
    if context.out.json:
        context.out.document(
            [{"name": item.name, "type": item.kind, "default": item.default, "help": item.help} for item in known]
        )
        return 0
    context.out.line(f"options of {format} (-o NAME=VALUE):")
    context.out.table(
        ("name", "value", "default", "meaning"),
        [(item.name, item.kind, "" if item.default is None else str(item.default), item.help) for item in known],
    )
    return 0

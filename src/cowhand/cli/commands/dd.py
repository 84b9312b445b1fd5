"""Copy a range of blocks of one image into a new one. The operands are those of dd(1).

count= counts from the beginning of the source, as in qemu-img: count - skip blocks are copied. Zeroes are left out.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from cowhand.cli import arguments
from cowhand.core.errors import InvalidArgument
from cowhand.core.units import format_size, parse_size

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand dd if=disk.qcow2 of=start.raw bs=1M count=16        the first 16 MiB
  cowhand dd -O qcow2 if=disk.raw of=rest.qcow2 bs=1M skip=16
"""
WRITES = True
OPERANDS = ("if", "of", "bs", "count", "skip")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "operand", nargs="+", metavar="NAME=VALUE", help="if=SOURCE of=TARGET [bs=SIZE] [count=N] [skip=N]"
    )
    arguments.add_format(parser, "the source")
    parser.add_argument("-O", "--target-format", metavar="FMT", help="format of the new image")
    parser.add_argument("--overwrite", action="store_true", help="replace what has the target's name")
    arguments.add_talk(parser)
    arguments.add_share(parser)
    parser.add_argument("--force", action="store_true", help="overwrite although other images stand on what is there")
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def operands(given: list[str]) -> dict[str, str]:
    """Parse "if=a of=b bs=1M"; raises InvalidArgument."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in OPERANDS:
            raise InvalidArgument(
                f"'{text}' is not an operand", hint="Known are: " + ", ".join(f"{known}=" for known in OPERANDS)
            )
        found[name] = value
    for name in ("if", "of"):
        if not found.get(name):
            raise InvalidArgument(f"{name}= is missing", hint="See: cowhand dd --help")
    return found


def run(args: argparse.Namespace, context: Context) -> int:
    """Copy the blocks."""
    given = operands(args.operand)
    source, target = given["if"], given["of"]
    format = arguments.format_for(target, args.target_format)
    from cowhand.cli.guard import refuse_existing, refuse_harm

    there = refuse_existing(target, args.overwrite)
    if there:
        refuse_harm(context, target, "writing over it", force=args.force or args.dry_run)
    if args.dry_run:
        return _plan(args, context, given, format, there)
    from cowhand.copy.ops.dd import dd

    result = dd(
        source,
        target,
        format,
        source_format=args.format,
        block_size=given.get("bs", "512"),
        count=given.get("count"),
        skip=given.get("skip", "0"),
        overwrite=args.overwrite,
        force_share=args.force_share,
        progress=context.progress(f"{os.path.basename(source)} → {os.path.basename(target)}"),
        cancel=context.cancel,
        warn=context.out.warn,
    )
    if context.out.json:
        document = {"filename": result.filename, "format": result.format, "virtual-size": result.size}
        context.out.document({**document, "copied": result.copied, "zeroes": result.zeroes})
    else:
        context.out.line(f"copied {format_size(result.copied)} of {format_size(result.size)} to {result.filename}")
    return 0


def _plan(args: argparse.Namespace, context: Context, given: dict[str, str], format: str, there: bool) -> int:
    import cowhand
    from cowhand.cli.guard import dependents
    from cowhand.cli.plan import Plan, Touch, show
    from cowhand.core.extents import by_content

    block = parse_size(given.get("bs", "512"))
    with cowhand.open(given["if"], format=args.format, force_share=args.force_share) as disk:
        end = min(disk.size, parse_size(given["count"]) * block) if "count" in given else disk.size
        begin = min(parse_size(given.get("skip", "0")) * block, end)
        data = sum(length for _, length, zero in by_content(disk.extents(begin, end - begin)) if not zero)
    plan = Plan(
        action=f"copy {format_size(end - begin)} of {given['if']} into {given['of']}, {format}",
        reads=[Touch(given["if"], f"data from {begin:#x} to {end:#x}", data)],
        writes=[Touch(given["of"], "its present content would be lost" if there else "new image")],
        moves=data,
        dependents=dependents(given["of"]) if there else [],
        undo="none: what the target holds now would be gone" if there else f"delete {given['of']}",
    )
    return show(plan, context.out)

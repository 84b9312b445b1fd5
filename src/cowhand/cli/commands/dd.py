"""Copy a range of blocks of one image into a new one. The operands are those of dd(1).

of=- writes raw bytes to standard output. count= counts from the beginning of the source, as in qemu-img: count - skip
blocks are copied. Zeroes are left out.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from cowhand.cli import arguments
from cowhand.cli.guard import add_guard
from cowhand.core.errors import InvalidArgument
from cowhand.core.units import format_size, parse_size

if TYPE_CHECKING:
    from cowhand.cli.running import Context
    from cowhand.copy.ops.convert import ConvertResult

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
    add_guard(parser, "overwrite although other images read through what is there")
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def operands(given: list[str]) -> dict[str, str]:
    """Parse "if=a of=b bs=1M"; raises InvalidArgument."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in OPERANDS:
            raise arguments.Usage(
                f"'{text}' is not an operand", hint="Known are: " + ", ".join(f"{known}=" for known in OPERANDS)
            )
        found[name] = value
    for name in ("if", "of"):
        if not found.get(name):
            raise arguments.Usage(f"{name}= is missing", hint="See: cowhand dd --help")
    return found


def run(args: argparse.Namespace, context: Context) -> int:
    """Copy the blocks."""
    given = operands(args.operand)
    source, target = given["if"], given["of"]
    from cowhand.cli.guard import guard_of, refuse_existing, tidy
    from cowhand.cli.own_source import refuse_own_source
    from cowhand.cli.standard_output import is_stream

    if is_stream(target):
        return _to_stream(args, context, given)
    format = arguments.format_for(target, args.target_format)
    refuse_own_source([source], target, args.format)
    there = refuse_existing(target, args.overwrite)
    tidy(context, target, remove=not args.dry_run)
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
        guard=guard_of(args, context),
    )
    return _tell(result, context)


def _tell(result: ConvertResult, context: Context) -> int:
    if context.out.json:
        document = {"filename": result.filename, "format": result.format, "virtual-size": result.size}
        context.out.document({**document, "copied": result.copied, "zeroes": result.zeroes})
    else:
        context.out.line(f"copied {format_size(result.copied)} of {format_size(result.size)} to {result.filename}")
    return 0


def _to_stream(args: argparse.Namespace, context: Context, given: dict[str, str]) -> int:
    """Write the blocks as raw bytes to standard output, or a pipe."""
    from cowhand.cli.standard_output import opened
    from cowhand.copy.ops.stream import stream

    if args.dry_run:
        raise arguments.Usage("--dry-run cannot be used when the target is a stream of bytes")
    block = parse_size(given.get("bs", "512"))
    if not block:
        raise InvalidArgument("blocks of 0 bytes are not copied", hint="Give bs= a size, such as bs=1M.")
    with opened(given["of"], args.target_format, context) as descriptor:
        result = stream(
            given["if"],
            descriptor,
            name="standard output" if given["of"] == "-" else given["of"],
            source_format=args.format,
            begin=parse_size(given.get("skip", "0")) * block,
            end=parse_size(given["count"]) * block if "count" in given else None,
            force_share=args.force_share,
            progress=context.progress(f"{os.path.basename(given['if'])} → {given['of']}"),
            cancel=context.cancel,
            warn=context.out.warn,
        )
    return _tell(result, context)


def _plan(args: argparse.Namespace, context: Context, given: dict[str, str], format: str, there: bool) -> int:
    import cowhand
    from cowhand.cli.guard import dependents, in_place_warning
    from cowhand.cli.plan import Plan, Touch, show
    from cowhand.core.extents import by_content
    from cowhand.plans.dependents import Dependents

    block = parse_size(given.get("bs", "512"))
    with cowhand.open(given["if"], format=args.format, force_share=args.force_share) as disk:
        end = min(disk.size, parse_size(given["count"]) * block) if "count" in given else disk.size
        begin = min(parse_size(given.get("skip", "0")) * block, end)
        data = sum(length for _, length, zero in by_content(disk.extents(begin, end - begin)) if not zero)
    plan = Plan(
        action=f"copy {format_size(end - begin)} of {given['if']} into {given['of']}, {format}",
        reads=[Touch(given["if"], f"data from {begin:#x} to {end:#x}", data)],
        writes=[
            Touch(
                given["of"],
                "its present content would be lost when the new image is complete" if there else "new image",
            )
        ],
        moves=data,
        dependents=dependents(given["of"], args) if there else Dependents(),
        warnings=in_place_warning(given["of"]) if there else [],
        undo="none: what the target holds now would be gone" if there else f"delete {given['of']}",
    )
    return show(plan, context.out)

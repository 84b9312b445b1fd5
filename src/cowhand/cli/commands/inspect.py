"""Show an image's header, and where its tables lie. With --untrusted: say whether it is safe to open, and if not, why.

--untrusted opens nothing that the image names, and takes no locks. Its exit code is 0 only if nothing is wrong, and 8 otherwise.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cowhand.cli import arguments
from cowhand.cli.several import run_each
from cowhand.core.errors import NotSupported
from cowhand.core.units import format_size
from cowhand.image.create import local_path

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand inspect disk.qcow2                 header and tables
  cowhand inspect --untrusted upload.qcow2   is it safe to open?
"""
WRITES = False
EXIT_UNSAFE = 8


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="image to look into")
    arguments.add_format(parser)
    parser.add_argument(
        "--untrusted",
        action="store_true",
        help="say whether an image from an untrusted source is safe to open, with reasons",
    )
    parser.add_argument(
        "--max-size", type=arguments.size, metavar="SIZE", help="with --untrusted: a larger disk is not accepted (64T)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Inspect one image after the other."""
    return run_each(args.image, context, lambda image: _run(image, args, context), separate=not args.untrusted)


def _run(image: str, args: argparse.Namespace, context: Context) -> int:
    path = local_path(image)
    if path is None:
        raise NotSupported(f"'{image}' is not a file on this machine", hint="Copy it here first.")
    if args.untrusted:
        return _judge(image, args, context, path)
    from cowhand.image.inspect import inspect

    found = inspect(path, args.format)
    if context.out.json:
        context.out.document(found)
        return 0
    header: dict[str, Any] = found["header"]
    context.out.facts((name, _shown(name, value)) for name, value in header.items())
    context.out.line()
    rows = [(f"{row['offset']:#x}", format_size(row["length"]), row["what"]) for row in found["regions"]]
    context.out.table(("offset", "length", "what"), rows, right=(0, 1))
    if found["regions-left-out"]:
        context.out.line(f"and {found['regions-left-out']} more")
    return 0


def _shown(name: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}" if name.endswith("offset") else str(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _judge(image: str, args: argparse.Namespace, context: Context, path: str) -> int:
    from cowhand.image.untrusted import MAX_VIRTUAL_SIZE, judge

    limit = MAX_VIRTUAL_SIZE if args.max_size is None else args.max_size
    verdict = judge(path, args.format, max_size=limit)._replace(path=image)
    if context.out.json:
        context.out.document(verdict.to_json())
    elif verdict.sound:
        context.out.line(f"{image}: {verdict.format}, nothing is wrong")
    else:
        context.out.line(f"{image}: {verdict.format}, not safe:")
        for reason in verdict.reasons:
            place = "" if reason.offset is None else f" (at {reason.offset:#x})"
            context.out.line(f"  {reason.code}: {reason.text}{place}")
    return 0 if verdict.sound else EXIT_UNSAFE

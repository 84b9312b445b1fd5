"""List, make and change the dirty bitmaps that an image keeps, and show what they have recorded.

A dirty bitmap records which parts of a disk were written since it was made or cleared: an incremental backup copies these and no others. It is kept
in the image (qcow2, version 3), and follows whatever writes the image through a program that knows bitmaps. One that was not stored
after the last writes, since the writer was killed, is inconsistent: its content is no longer reliable, and it can only be removed.
"""

from __future__ import annotations

import argparse
import shlex
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import cowhand
from cowhand.cli import arguments
from cowhand.core.errors import CowhandError
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from cowhand.bitmaps.named import DirtyBitmap
    from cowhand.block.disk import Disk
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand bitmap add disk.qcow2 nightly              record what is written from now on
  cowhand bitmap list disk.qcow2
  cowhand bitmap dirty disk.qcow2 nightly            what was written
  cowhand bitmap clear disk.qcow2 nightly            begin anew, after a backup
  cowhand bitmap merge disk.qcow2 week nightly       add what nightly has to week
  cowhand bitmap merge base.qcow2 all b0 -b top.qcow2   from another image
"""
ACTIONS = ("list", "add", "remove", "clear", "enable", "disable", "merge", "dirty")
_READING = ("list", "dirty")
_DONE = {
    "add": "added bitmap {name} to {image}",
    "remove": "removed bitmap {name} from {image}",
    "clear": "cleared bitmap {name} of {image}",
    "enable": "bitmap {name} of {image} records what is written",
    "disable": "bitmap {name} of {image} does not record any more",
    "merge": "merged {source} into bitmap {name} of {image}",
}


def writes(args: argparse.Namespace) -> bool:
    """Tell whether the image is changed."""
    return args.action not in _READING and not args.dry_run


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("image", help="image that keeps the bitmaps")
    parser.add_argument("name", nargs="?", help="the bitmap")
    parser.add_argument("source", nargs="?", metavar="from", help="merge: the bitmap that is added to it")
    arguments.add_format(parser)
    parser.add_argument(
        "-g",
        "--granularity",
        type=arguments.size,
        metavar="SIZE",
        help="add: bytes of the disk that one bit stands for",
    )
    parser.add_argument("--disabled", action="store_true", help="add: one that does not record before it is enabled")
    parser.add_argument("-b", "--source-file", metavar="IMAGE", help="merge: the image that keeps the other bitmap")
    parser.add_argument("-F", "--source-format", metavar="FMT", help="its format")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")
    arguments.add_share(parser)
    arguments.add_dry_run(parser)
    parser.add_argument(
        "--force", action="store_true", help="write although the system uses the image (a mounted device)"
    )
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Do the action."""
    _check(args)
    if args.action in _READING:
        options: dict[str, Any] = {"format": args.format, "force_share": args.force_share, "backing": False}
        with cowhand.open(args.image, **options) as disk:
            return _list(disk, args, context) if args.action == "list" else _dirty(disk, args, context)
    if args.dry_run:
        return _plan(args, context)
    with ExitStack() as stack:
        disk = stack.enter_context(cowhand.open(args.image, format=args.format, writable=True, backing=False))
        source = _source(args, disk, stack)
        _do(args, disk, source)
    if context.out.json:
        context.out.document({"action": args.action, "filename": args.image, "bitmap": args.name})
    else:
        context.out.line(_DONE[args.action].format(name=args.name, image=args.image, source=args.source))
    return 0


def _check(args: argparse.Namespace) -> None:
    action = args.action
    usage = (
        f"cowhand bitmap {action} IMAGE"
        + (" NAME" if action != "list" else "")
        + (" FROM" if action == "merge" else "")
    )
    for wrong, message in (
        (action != "list" and not args.name, "the bitmap needs a name"),
        (action == "list" and args.name is not None, "list takes an image alone"),
        (action == "merge" and not args.source, "which bitmap is to be merged?"),
        (action != "merge" and args.source is not None, f"{action} takes one bitmap"),
        (
            action != "add" and (args.granularity is not None or args.disabled),
            "--granularity and --disabled are for add",
        ),
        (action != "merge" and args.source_file is not None, "--source-file is for merge"),
        (args.source_format is not None and args.source_file is None, "--source-format needs --source-file"),
    ):
        if wrong:
            raise arguments.Usage(message, hint=usage)


def _source(args: argparse.Namespace, disk: Disk, stack: ExitStack) -> Disk:
    if args.source_file is None:
        return disk
    options: dict[str, Any] = {"format": args.source_format, "force_share": args.force_share, "backing": False}
    return stack.enter_context(cowhand.open(args.source_file, **options))


def _do(args: argparse.Namespace, disk: Disk, source: Disk) -> None:
    from cowhand.image import bitmaps

    match args.action:
        case "add":
            bitmaps.add_bitmap(disk, args.name, granularity=args.granularity, enabled=not args.disabled)
        case "remove":
            bitmaps.remove_bitmap(disk, args.name)
        case "clear":
            bitmaps.clear_bitmap(disk, args.name)
        case "enable" | "disable":
            bitmaps.enable_bitmap(disk, args.name, enabled=args.action == "enable")
        case _:
            bitmaps.merge_bitmap(disk, args.name, bitmaps.find_bitmap(source, args.source))


# -- looking


def bitmap_document(bitmap: DirtyBitmap) -> dict[str, Any]:
    """Return one bitmap with stable keys; ``dirty-bytes`` is null where its content cannot be had."""
    dirty, problem = _amount(bitmap)
    document: dict[str, Any] = {
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "enabled": bitmap.enabled,
        "inconsistent": bitmap.inconsistent,
        "dirty-bytes": dirty,
    }
    if problem:
        document["problem"] = problem
    return document


def _amount(bitmap: DirtyBitmap) -> tuple[int | None, str]:
    """Return the bytes that are dirty, or why nobody knows."""
    if bitmap.inconsistent:
        return None, "not stored after the last writes"
    try:
        return bitmap.bits.dirty_bytes(), ""
    except CowhandError as error:
        return None, error.message


def _list(disk: Disk, args: argparse.Namespace, context: Context) -> int:
    from cowhand.image.bitmaps import broken_reason, readable_bitmaps

    documents = [bitmap_document(bitmap) for bitmap in readable_bitmaps(disk)]
    broken = broken_reason(disk)
    if context.out.json:
        context.out.document(documents if documents or broken is None else None)
    elif broken is not None and not documents:
        context.out.line(f"{args.image}: its bitmaps are unreadable")
    elif not documents:
        context.out.line(f"{args.image} has no bitmaps")
    else:
        rows = [
            (
                one["name"],
                format_size(one["granularity"]),
                "inconsistent" if one["inconsistent"] else "recording" if one["enabled"] else "disabled",
                format_size(one["dirty-bytes"]) if one["dirty-bytes"] is not None else f"unknown: {one['problem']}",
            )
            for one in documents
        ]
        context.out.table(("bitmap", "granularity", "state", "dirty"), rows, right=(1,))
    if broken is not None:
        context.out.flush()
        raise broken
    return 0


def _dirty(disk: Disk, args: argparse.Namespace, context: Context) -> int:
    from cowhand.image.bitmaps import dirty_extents, find_bitmap

    extents = dirty_extents(disk, args.name)
    if context.out.json:
        bitmap = find_bitmap(disk, args.name)
        rows = [{"start": start, "length": length} for start, length in extents]
        context.out.document({**bitmap_document(bitmap), "virtual-size": disk.size, "extents": rows})
        return 0
    total = count = 0
    for start, length in extents:
        context.cancel.check()
        if not count:
            context.out.line(f"{'start':>18}  {'length':>18}")
        context.out.line(f"{start:#18x}  {length:#18x}")
        total, count = total + length, count + 1
    context.out.line(
        f"{format_size(total)} of {format_size(disk.size)} dirty, in {count} {'piece' if count == 1 else 'pieces'}"
    )
    return 0


def _plan(args: argparse.Namespace, context: Context) -> int:
    from cowhand.cli.plan import Plan, Touch, show
    from cowhand.image.bitmaps import check_new_bitmap, find_bitmap

    image, name = shlex.quote(args.image), shlex.quote(args.name)
    keep = f"none, unless you keep its content first: cowhand bitmap add {image} COPY --disabled; cowhand bitmap merge {image} COPY {name}"
    reads = [Touch(args.image, "the bitmap directory")]
    with ExitStack() as stack:
        options: dict[str, Any] = {"format": args.format, "force_share": args.force_share, "backing": False}
        disk = stack.enter_context(cowhand.open(args.image, **options))
        if args.action == "add":
            check_new_bitmap(disk, args.name, args.granularity)
        else:
            find_bitmap(disk, args.name).check(read_only=True, inconsistent=args.action == "remove")
        if args.action == "merge":
            find_bitmap(_source(args, disk, stack), args.source).check(read_only=True)
            reads.append(Touch(args.source_file or args.image, f"bitmap {args.source}"))
    undo = {
        "add": f"cowhand bitmap remove {image} {name}",
        "enable": f"cowhand bitmap disable {image} {name}",
        "disable": f"cowhand bitmap enable {image} {name}; what is written meanwhile is not recorded",
    }.get(args.action, keep)
    plan = Plan(
        action=f"{args.action} bitmap {args.name} of {args.image}",
        reads=reads,
        writes=[Touch(args.image, "the bitmap and the directory; no guest data")],
        undo=undo,
    )
    return show(plan, context.out)

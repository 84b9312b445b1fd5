"""Create, list, apply or delete snapshots inside an image.

A snapshot keeps the disk as it is at one moment; what is written later goes elsewhere in the same file. Applying one brings that
moment back: what the disk holds now is lost unless it is in a snapshot itself.
"""

from __future__ import annotations

import argparse
import shlex
from contextlib import nullcontext
from typing import TYPE_CHECKING

import cowhand
from cowhand.cli import arguments
from cowhand.cli.guard import add_guard, guard_of
from cowhand.cli.several import run_each
from cowhand.core.errors import InvalidArgument, InvalidFormat, NotSupported
from cowhand.core.units import format_size
from cowhand.image.info import image_info, snapshot_document

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.records import SnapshotInfo
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand snapshot create disk.qcow2 before-upgrade
  cowhand snapshot list disk.qcow2
  cowhand snapshot apply disk.qcow2 before-upgrade
  cowhand snapshot delete disk.qcow2 monday tuesday wednesday
  cowhand snapshot create --name before-upgrade *.qcow2       the same in several images
"""
WRITES = True
ACTIONS = ("create", "list", "apply", "delete")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("image", help="image that holds the snapshots")
    parser.add_argument(
        "name",
        nargs="*",
        help="id of the snapshot, or its name (snapshot.id=ID, snapshot.name=NAME where a word is both); delete takes several, list further images",
    )
    parser.add_argument(
        "--name",
        dest="named",
        action="append",
        default=[],
        metavar="NAME",
        help="the snapshot; all operands are images",
    )
    arguments.add_format(parser)
    add_guard(parser, "apply although other images read through this one")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")
    arguments.add_share(parser)
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Do the action."""
    if args.action == "list":
        if args.named:
            raise arguments.Usage("list takes images alone", hint="cowhand snapshot list IMAGE ...")
        return run_each([args.image, *args.name], context, lambda image: _list(image, args, context), separate=True)
    images, names = _operands(args)
    do = _plan_each if args.dry_run else _change
    if args.action == "delete" and not args.dry_run and len(images) * len(names) > 1:
        for image in images:  # all of them are there, or none is deleted
            known = list(image_info(image, format=args.format).snapshots)
            for name in names:
                _choose(known, name, image)
    with context.out.gathering() if len(images) == 1 < len(names) else nullcontext():
        return run_each(images, context, lambda image: do(image, names, args, context))


def _operands(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return images and names. Raises Usage for more names than the action takes, or for none."""
    images, names = ([args.image, *args.name], args.named) if args.named else ([args.image], args.name)
    if not all(names) or not names:
        raise arguments.Usage("the snapshot needs a name", hint=f"cowhand snapshot {args.action} IMAGE NAME")
    if len(names) > 1 and args.action != "delete":
        raise arguments.Usage(
            f"{args.action} takes one snapshot",
            hint=f"Several images: cowhand snapshot {args.action} --name NAME IMAGE ...",
        )
    return images, names


def _change(image: str, names: list[str], args: argparse.Namespace, context: Context) -> int:
    from cowhand.image.snapshots import delete_snapshot

    with cowhand.open(image, format=args.format, writable=True) as disk:
        disk.guard = lambda: guard_of(args, context)
        if args.action == "delete":
            known = _known(disk)
            # Once, where an id and a name say the same.
            for one in dict.fromkeys(_choose(known, name, disk.filename) for name in names):
                context.cancel.check()
                delete_snapshot(disk, one)
                _tell(image, one, args, context)
            return 0
        for name in names:
            context.cancel.check()
            done = {"create": _create, "apply": _apply}[args.action](disk, name)
            _tell(image, done, args, context)
    return 0


def _tell(image: str, done: SnapshotInfo, args: argparse.Namespace, context: Context) -> None:
    if context.out.json:
        context.out.document({"action": args.action, "filename": image, "snapshot": snapshot_document(done)})
    else:
        words = {"create": "created snapshot", "apply": "went back to snapshot", "delete": "deleted snapshot"}
        context.out.line(f"{words[args.action]} {done.name or done.id} of {image}")


def _choose(known: list[SnapshotInfo], name: str, image: str) -> SnapshotInfo:
    from cowhand.image.snapshots import choose

    return choose(known, name, image)


def _known(disk: Disk) -> list[SnapshotInfo]:
    from cowhand.image.snapshots import list_snapshots

    try:
        return list_snapshots(disk)
    except NotSupported as error:
        name = shlex.quote(disk.filename)
        error.hint = f"Put an overlay on it instead: cowhand create -f qcow2 -b {name} -F {disk.format} OVERLAY"
        raise


def _create(disk: Disk, name: str) -> SnapshotInfo:
    from cowhand.image.snapshots import create_snapshot

    if any(name in (one.name, one.id) for one in _known(disk)):
        raise InvalidArgument(
            f"a snapshot '{name}' exists already",
            path=disk.filename,
            hint="Choose another name, or delete that one first.",
        )
    return create_snapshot(disk, name)


def _apply(disk: Disk, name: str) -> SnapshotInfo:
    from cowhand.image.snapshots import apply_snapshot, choose

    chosen = choose(_known(disk), name, disk.filename)
    apply_snapshot(disk, chosen)
    return chosen


def _list(image: str, args: argparse.Namespace, context: Context) -> int:
    from cowhand.cli.commands.info import snapshot_table

    info = image_info(image, format=args.format, force_share=args.force_share)
    if info.snapshots_problem:
        if context.out.json:
            context.out.document(None)
        raise InvalidFormat(
            f"the snapshots are unreadable: {info.snapshots_problem}",
            path=image,
            hint=f"See: cowhand check {shlex.quote(image)}",
        )
    if context.out.json:
        context.out.document([snapshot_document(one) for one in info.snapshots])
    elif info.snapshots:
        if args.name:
            context.out.line(f"{image}:")
        snapshot_table(info.snapshots, context)
    else:
        context.out.line(f"{image} has no snapshots")
    return 0


def _plan_each(image: str, names: list[str], args: argparse.Namespace, context: Context) -> int:
    for name in names:
        _plan(argparse.Namespace(**{**vars(args), "image": image, "name": name}), context)
    return 0


def _plan(args: argparse.Namespace, context: Context) -> int:
    from cowhand.cli.guard import dependents
    from cowhand.cli.plan import Plan, Touch, show
    from cowhand.image.snapshots import choose
    from cowhand.plans.dependents import Dependents

    info = image_info(args.image, format=args.format)
    if info.snapshots_problem:
        raise InvalidFormat(f"the snapshots are unreadable: {info.snapshots_problem}", path=args.image)
    image = shlex.quote(args.image)
    name = shlex.quote(args.name)
    warnings = []
    if args.action == "create":
        action, what = f"create snapshot {args.name} of {args.image}", "tables; no data is copied"
        undo = f"cowhand snapshot delete {image} {name}"
    else:
        chosen = choose(list(info.snapshots), args.name, args.image)
        action = f"{args.action} snapshot {chosen.name or chosen.id} of {args.image}"
        what = "tables; data is neither copied nor erased" if args.action == "apply" else "tables; space is given back"
        undo = "none: the snapshot is gone then"
        if args.action == "apply":
            undo = f"none, unless you keep today's state first: cowhand snapshot create {image} NAME"
            warnings.append("what the disk holds now would be lost, but for what snapshots hold")
            if chosen.disk_size and chosen.disk_size != info.virtual_size:
                warnings.append(f"the disk would have {format_size(chosen.disk_size)} again")
    plan = Plan(
        action=action,
        reads=[Touch(args.image, "tables")],
        writes=[Touch(args.image, what)],
        dependents=dependents(args.image, args) if args.action == "apply" else Dependents(),
        warnings=warnings,
        undo=undo,
    )
    return show(plan, context.out)

"""List, add, change or remove the passphrases of an encrypted image: a LUKS volume, or LUKS inside qcow2.

Each passphrase has a key slot of its own, and any of them opens the image; the data is not touched. --secret and --key-file give a passphrase that
opens it now, which is asked for on the terminal where neither is given; "change" puts a new one in its place, "remove" removes it, or the key slot
--slot. The last passphrase is not removed unless you insist with --force: all data would be lost.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import cowhand
from cowhand.cli import arguments
from cowhand.core.errors import NotSupported

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand passphrase list disk.qcow2
  cowhand passphrase change disk.qcow2                                      asks for the old one and the new one
  cowhand passphrase add --key-file old.key --new-key-file new.key disk.luks
  cowhand passphrase remove --key-file old.key disk.luks                    old.key opens it no longer
  cowhand passphrase remove --slot 3 disk.qcow2
"""
WRITES = True
ACTIONS = ("list", "add", "change", "remove")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("image", help="encrypted image")
    arguments.add_format(parser)
    parser.add_argument(
        "--new-secret", dest="target_secret", action="store_true", help="ask for the new passphrase on the terminal"
    )
    parser.add_argument(
        "--new-key-file",
        dest="target_key_file",
        action="append",
        metavar="FILE",
        help="take the new passphrase from FILE",
    )
    parser.add_argument(
        "--slot", type=int, metavar="N", help="add: into this key slot; remove: the key slot that is erased"
    )
    parser.add_argument("--iter-time", type=int, metavar="MS", help="milliseconds that trying the new passphrase takes")
    parser.add_argument(
        "--force",
        action="store_true",
        help="add: take a slot that is in use; remove: the last one, too, which loses all data",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")
    arguments.add_share(parser)
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def ask(args: argparse.Namespace) -> None:
    """Have what is not given asked for on the terminal."""
    if args.action == "list" or args.dry_run:
        return
    if not args.key_file:
        args.secret = True
    if args.action in ("add", "change") and not args.target_key_file:
        args.target_secret = True


def run(args: argparse.Namespace, context: Context) -> int:
    """Do the action."""
    _check(args)
    if args.action == "list":
        return _list(args, context)
    if args.dry_run:
        return _plan(args, context)
    from cowhand.cli.secrets import NEW
    from cowhand.crypto import secrets
    from cowhand.image import key_slots

    old = secrets.candidates(None, "key-secret")[0]
    new = secrets.lookup(NEW) if args.action != "remove" else b""
    with cowhand.open(args.image, format=args.format, writable=True, backing=False) as disk:
        match args.action:
            case "add":
                done = [key_slots.add_passphrase(disk, new, slot=args.slot, iter_time=args.iter_time, force=args.force)]
                words = f"the new passphrase of {args.image} is in key slot {done[0]}"
            case "change":
                done = [key_slots.change_passphrase(disk, old, new, iter_time=args.iter_time)]
                words = f"changed the passphrase of {args.image}; the new one is in key slot {done[0]}"
            case _:
                given = old if args.slot is None else None
                done = key_slots.remove_passphrase(disk, given, slot=args.slot, force=args.force)
                words = f"removed key slot {', '.join(map(str, done))} of {args.image}"
        left = [one.number for one in key_slots.key_slots(disk) if one.active]
    if context.out.json:
        context.out.document({"action": args.action, "filename": args.image, "slots": done, "active-slots": left})
    else:
        context.out.line(words)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.action in ("list", "change") and args.slot is not None:
        raise arguments.Usage("--slot is for add and remove", hint="See: cowhand passphrase --help")
    if args.action in ("list", "remove") and (args.target_secret or args.target_key_file or args.iter_time is not None):
        raise arguments.Usage("a new passphrase is for add and change", hint="See: cowhand passphrase --help")


def _slots(args: argparse.Namespace) -> list[dict[str, Any]]:
    from cowhand.image.info import image_info

    info = image_info(args.image, format=args.format, force_share=args.force_share)
    details = info.details or {}
    found = details if info.format == "luks" else details.get("encrypt") or {}
    if "slots" not in found:
        raise NotSupported(
            f"'{args.image}' is not encrypted with LUKS", hint="cowhand info tells how an image is encrypted."
        )
    return [{"slot": number, **slot} for number, slot in enumerate(found["slots"])]


def _list(args: argparse.Namespace, context: Context) -> int:
    slots = _slots(args)
    if context.out.json:
        context.out.document(slots)
        return 0
    rows = [
        (str(one["slot"]), "in use" if one["active"] else "free", str(one.get("iters", "")) if one["active"] else "")
        for one in slots
    ]
    context.out.table(("slot", "state", "iterations"), rows, right=(0, 2))
    return 0


def _plan(args: argparse.Namespace, context: Context) -> int:
    from cowhand.cli.plan import Plan, Touch, show

    active = [one["slot"] for one in _slots(args) if one["active"]]
    what = {
        "add": "one free key slot",
        "change": "one free key slot, then the key slot of the old passphrase",
        "remove": "the key slot of the passphrase" if args.slot is None else f"key slot {args.slot}",
    }[args.action]
    last = args.action == "remove" and len(active) == 1
    plan = Plan(
        action={"add": "add a passphrase to", "change": "change a passphrase of", "remove": "remove a passphrase of"}[
            args.action
        ]
        + f" {args.image}",
        reads=[Touch(args.image, "its encryption header")],
        writes=[Touch(args.image, what)],
        warnings=["it is the last one: all data would be lost, and without --force this is refused"] if last else [],
        undo="cowhand passphrase remove"
        if args.action == "add"
        else "none: the old passphrase opens the image no longer",
    )
    return show(plan, context.out)

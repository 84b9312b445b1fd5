"""Show which programs have an image open, what each uses of it, and what it denies to others.

The locks are those that QEMU and cowhand put on bytes 100 to 103 (used: consistent read, write, write unchanged, resize) and 200 to 203
(refused to others). Programs that take no locks are shown too, and so are loop devices. The image itself is not opened.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cowhand.block.locking.holders import LockHolder, lock_holders
from cowhand.cli import arguments
from cowhand.core.errors import ImageInUse, InvalidArgument

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand locks disk.qcow2
  cowhand locks --chain top.qcow2           of its backing files, too
  cowhand locks disk.qcow2 && echo not in use
"""
WRITES = False
EXIT_HELD = ImageInUse.exit_code


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="image, or any other file")
    parser.add_argument("--chain", action="store_true", help="show its backing files, too")
    arguments.add_format(parser, "the images (with --chain)")
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Tell."""
    found = [(path, lock_holders(path)) for path in _paths(args)]
    if context.out.json:
        context.out.document([{"filename": path, "holders": [_document(one) for one in held]} for path, held in found])
    else:
        for path, held in found:
            _show(path, held, context)
    return EXIT_HELD if any(held for _, held in found) else 0


def _paths(args: argparse.Namespace) -> list[str]:
    from cowhand.image.create import local_path

    paths: list[str] = []
    for name in args.image:
        if local_path(name) is None:
            raise InvalidArgument(f"'{name}' is not a file on this machine")
        if not args.chain:
            paths.append(local_path(name) or name)
            continue
        from cowhand.image.info import chain_info

        for info in chain_info(name, format=args.format, force_share=True):
            if not info.problem:
                paths.append(info.filename)
    return paths


def _document(one: LockHolder) -> dict[str, Any]:
    return {
        "pid": one.pid or None,
        "program": one.program,
        "command": list(one.command),
        "user": one.user or None,
        "access": one.access or None,
        "uses": list(one.uses),
        "refuses": list(one.refuses),
        "locks": [{"first": lock.first, "last": lock.last, "mode": lock.mode} for lock in one.locks],
    }


def _show(path: str, held: list[LockHolder], context: Context) -> None:
    out = context.out
    if not held:
        out.line(f"{path}: not open in any program")
        return
    out.line(f"{path}:")
    rows = [
        (
            str(one.pid) if one.pid else "-",
            one.program,
            one.user,
            one.access,
            ", ".join(one.uses) or ("no image locks" if not one.refuses else "-"),
            ", ".join(one.refuses) or "-",
            " ".join(
                str(lock.first) if lock.first == lock.last else f"{lock.first}..{'' if lock.last >> 62 else lock.last}"
                for lock in one.locks
            ),
        )
        for one in held
    ]
    out.table(("pid", "program", "user", "opened for", "uses", "refuses", "bytes"), rows, right=(0,))
    for one in held:
        if one.command:
            out.line(f"  {one.pid}: {' '.join(one.command)}")

"""Write an overlay's changes into the image below it, and empty the overlay, which then shows the base.

Every other overlay of that base would read changed bytes afterwards, and so would internal snapshots of the overlay itself. So images that
depend on the base are looked for: beside it and beside the overlay, below, in folders beside those, in known pools and on block devices
(--look-in names more folders). The commit is refused where there are some, or where not everything could be looked at. --force does
it all the same.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from cowhand.cli import arguments
from cowhand.cli.guard import add_guard, guard_of
from cowhand.core.errors import ImageNotFound, InvalidArgument
from cowhand.core.identity import identify
from cowhand.core.units import format_size
from cowhand.image.info import ImageInfo, chain_info

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand commit work.qcow2                     into the image that it stands on
  cowhand commit --dry-run work.qcow2           what that would do, and to whom
  cowhand commit -b base.qcow2 work.qcow2       through all layers, down to base.qcow2
"""
WRITES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="overlay whose changes go down")
    arguments.add_format(parser)
    parser.add_argument(
        "-b", "--base", metavar="BASE", help="write into this image of the chain; the overlay is then not emptied"
    )
    parser.add_argument(
        "-d", "--no-empty", action="store_true", help="leave the overlay as it is: it is going to be deleted"
    )
    add_guard(parser, "commit although other images, or snapshots, will show other data")
    parser.add_argument(
        "-r", "--rate-limit", type=arguments.size, default=0, metavar="SIZE", help="bytes a second, at most"
    )
    parser.add_argument(
        "-t",
        "--cache",
        choices=arguments.CACHE_NAMES,
        metavar="MODE",
        default="writeback",
        help="how both images are written",
    )
    arguments.add_talk(parser)
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Commit, when nobody else needs the base as it is."""
    layers = layers_to(chain_info(args.image, format=args.format), args.base, args.image)
    names = [info.filename for info in layers]
    if args.dry_run:
        return _plan(args, context, layers)
    from cowhand.jobs.commit import commit

    result = commit(
        args.image,
        args.base,
        format=args.format,
        drop=args.no_empty,
        rate_limit=args.rate_limit,
        cache=args.cache,
        progress=context.progress(f"{os.path.basename(names[0])} → {os.path.basename(names[-1])}"),
        cancel=context.cancel,
        warn=context.out.warn,
        guard=guard_of(args, context),
    )
    if context.out.json:
        document = {"filename": args.image, "base": result.base, "copied": result.copied, "zeroes": result.zeroes}
        context.out.document({**document, "base-grown": result.grown, "emptied": result.emptied})
        return 0
    text = f"committed {format_size(result.copied + result.zeroes)} into {result.base}"
    if result.grown:
        text += ", which grew"
    context.out.line(text + (f"; {args.image} is empty now" if result.emptied else ""))
    return 0


def layers_to(chain: list[ImageInfo], base: str | None, image: str) -> list[ImageInfo]:
    """Return the images from the top to *base* (None: the one directly below); raises CowhandError where that is not possible."""
    if len(chain) == 1:
        raise InvalidArgument(f"'{image}' stands on no other image", path=image)
    if chain[-1].problem:
        missing = chain[-1]
        raise ImageNotFound(f"the chain of '{image}' is not complete: {missing.problem}", path=missing.filename)
    if base is None:
        return chain[:2]
    for depth, info in enumerate(chain[1:], start=1):
        candidates = (base, os.path.join(os.path.dirname(chain[depth - 1].filename), base))
        wanted = identify(info.filename)
        if base == info.filename or (wanted is not None and wanted in (identify(name) for name in candidates)):
            return chain[: depth + 1]
    known = ", ".join(info.filename for info in chain[1:])
    raise InvalidArgument(f"'{base}' is not below '{image}'", path=image, hint=f"Below it are: {known}")


def _plan(args: argparse.Namespace, context: Context, layers: list[ImageInfo]) -> int:
    import cowhand
    from cowhand.cli.plan import Plan, Touch, show
    from cowhand.core.extents import ALLOCATED, DATA
    from cowhand.jobs.commit import change_of, look_for_room

    top, base = layers[0], layers[-1]
    data = zero = 0
    with cowhand.open(args.image, format=args.format) as disk:
        found = guard_of(args, context).look(change_of(disk.root, len(layers) - 1))
        for batch in disk.extents(depth=len(layers) - 1):
            stored = batch.total(DATA | ALLOCATED)
            data += stored
            zero += batch.total(ALLOCATED) - stored
    keeps = args.no_empty or args.base is not None
    writes = [Touch(base.filename, "data, and zeroes" if zero else "data", data)]
    if top.virtual_size > base.virtual_size:
        writes.append(Touch(base.filename, f"its length becomes {format_size(top.virtual_size)}"))
    if not keeps:
        writes.append(Touch(top.filename, "emptied when the base holds everything"))
    room = look_for_room(args.image, len(layers) - 1, format=args.format)
    plan = Plan(
        action=f"commit {top.filename} into {base.filename}",
        reads=[Touch(info.filename, "what it stores") for info in layers[:-1]],
        writes=writes,
        moves=data,
        dependents=found,
        warnings=[
            *([f"it will not fit: {room.words()}"] if room is not None else []),
            *(f"{info.filename} will show other data: what is committed passes it by" for info in layers[1:-1]),
        ],
        undo="none: the base's present content is gone. Take a snapshot of it, or copy it, first",
    )
    return show(plan, context.out)

"""The guard of a command: what looks for images that depend on what the command changes."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from cowhand.core.errors import ImageExists
from cowhand.image.create import local_path

if TYPE_CHECKING:
    from cowhand.cli.running import Context
    from cowhand.plans.dependents import Dependents
    from cowhand.plans.guard import DependentsGuard


def add_guard(parser: argparse.ArgumentParser, force: str) -> None:
    """Add ``--force``, which does what *force* says, and ``--look-in``."""
    parser.add_argument("--force", action="store_true", help=force)
    parser.add_argument(
        "--look-in",
        action="append",
        default=[],
        metavar="FOLDER",
        help="also search FOLDER for images that depend on what is changed",
    )


def guard_of(args: argparse.Namespace, context: Context) -> DependentsGuard:
    """Return the guard that the options of :func:`add_guard` ask for; what they override is told as a warning."""
    # Only here: most commands make something new, and start the quicker without.
    from cowhand.plans.guard import DependentsGuard

    return DependentsGuard(look_in=args.look_in, force=args.force, warn=context.out.warn)


def dependents(image: str, args: argparse.Namespace) -> Dependents:
    """Return what depends on *image*; nothing where it is no file of this system."""
    from cowhand.plans.dependents import Dependents, find_dependents

    path = local_path(image)
    return Dependents() if path is None else find_dependents(path, look_in=args.look_in)


def tidy(context: Context, target: str, *, remove: bool = True) -> None:
    """Remove what interrupted runs left in the folder of *target*, and tell of it; only tell without *remove*."""
    path = local_path(target)
    if path is None:
        return
    from cowhand.image.leftovers import sweep

    found = sweep(os.path.dirname(os.path.realpath(path)), remove=remove)
    for name in found.removed:
        context.out.note(f"{'removed' if remove else 'would remove'} {name}, which an interrupted run left behind")
    for name in found.kept:
        context.out.note(
            f"{name} belongs to a run that did not end, perhaps on another machine; delete it if that run is over"
        )


def in_place_warning(target: str, *, backing: str | None = None) -> list[str]:
    """Return the sentence which says that the existing *target* will be written in place, where it will."""
    path = local_path(target)
    if path is None or not os.path.lexists(path):
        return []
    from cowhand.image.placement import in_place_words
    from cowhand.image.replacing import reason_for_place

    reason = reason_for_place(path, names_relative=bool(backing) and not os.path.isabs(backing or ""))
    return [in_place_words(target, reason)] if reason is not None else []


def refuse_existing(path: str, overwrite: bool) -> bool:
    """Tell whether something has the name *path*; raise ImageExists when it may not be overwritten."""
    local = local_path(path)
    there = local is not None and os.path.lexists(local)
    if there and not overwrite:
        raise ImageExists(
            f"'{path}' exists already", path=path, hint="Choose another name, or insist with --overwrite."
        )
    return there

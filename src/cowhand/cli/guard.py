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
        help="look for images that depend on what is changed there, too",
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


def refuse_existing(path: str, overwrite: bool) -> bool:
    """Tell whether something has the name *path*; raise ImageExists when it may not be overwritten."""
    local = local_path(path)
    there = local is not None and os.path.lexists(local)
    if there and not overwrite:
        raise ImageExists(
            f"'{path}' exists already", path=path, hint="Choose another name, or insist with --overwrite."
        )
    return there

"""Looking, before an image's content is changed, for other images that stand on it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cowhand.core.errors import ImageExists
from cowhand.image.create import local_path

if TYPE_CHECKING:
    from cowhand.cli.running import Context


def refuse_harm(
    context: Context,
    image: str,
    doing: str,
    *,
    force: bool,
    apart: Iterable[str] = (),
    folders: Iterable[str] = (),
) -> None:
    """Raise OverlaysExist when *doing* something to *image* would change what other images read; with *force* warn instead."""
    path = local_path(image)
    if path is None:
        return
    # Only here: most commands make something new, and start the quicker without.
    from cowhand.chain.tree import OverlaysExist, refuse_if_needed

    try:
        unknown = refuse_if_needed(path, doing, folders=tuple(folders), apart=apart)
        if unknown:
            context.out.warn(f"could not find out whether these stand on {image}: {', '.join(unknown)}")
    except OverlaysExist as error:
        if not force:
            raise
        context.out.warn(error.message)


def dependents(image: str, apart: Iterable[str] = ()) -> list[str]:
    """Return the images in the folder of *image* that stand on it, directly or not, but for those in *apart*."""
    path = local_path(image)
    if path is None:
        return []
    from cowhand.chain.tree import Tree, folder_of, identify

    known = {identify(name) for name in apart}
    tree = Tree([folder_of(path)])
    return [reference.path for reference in tree.descendants(path) if identify(reference.path) not in known]


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
        context.out.note(f"{name} is of a run that did not end, perhaps on another machine; delete it if that is over")


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

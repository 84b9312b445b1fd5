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


def refuse_existing(path: str, overwrite: bool) -> bool:
    """Tell whether something has the name *path*; raise ImageExists when it may not be overwritten."""
    local = local_path(path)
    there = local is not None and os.path.lexists(local)
    if there and not overwrite:
        raise ImageExists(
            f"'{path}' exists already", path=path, hint="Choose another name, or insist with --overwrite."
        )
    return there

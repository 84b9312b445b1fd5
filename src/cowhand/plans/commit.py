"""What a commit would do."""

from __future__ import annotations

import os

from cowhand.core.errors import ImageNotFound, InvalidArgument
from cowhand.core.extents import ALLOCATED, DATA
from cowhand.core.identity import identify
from cowhand.core.units import format_size
from cowhand.image.info import ImageInfo, chain_info
from cowhand.image.open import open_image
from cowhand.jobs.commit import change_of, look_for_room
from cowhand.plans.guard import DependentsGuard
from cowhand.plans.plan import Plan, Touch


def plan_commit(
    image: str,
    base: str | None = None,
    *,
    format: str | None = None,
    drop: bool = False,
    guard: DependentsGuard | None = None,
) -> Plan:
    """Return what :func:`cowhand.commit` with these arguments would do; nothing is changed. Raises CowhandError where it is not possible.

    *guard* says into which further folders is looked for images that depend on what changes.
    """
    guard = guard or DependentsGuard()
    layers = layers_to(chain_info(image, format=format), base, image)
    top, bottom = layers[0], layers[-1]
    data = zero = 0
    with open_image(image, format=format) as disk:
        found = guard.look(change_of(disk.root, len(layers) - 1))
        for batch in disk.extents(depth=len(layers) - 1):
            stored = batch.total(DATA | ALLOCATED)
            data += stored
            zero += batch.total(ALLOCATED) - stored
    writes = [Touch(bottom.filename, "data, and zeroes" if zero else "data", data)]
    if top.virtual_size > bottom.virtual_size:
        writes.append(Touch(bottom.filename, f"its length becomes {format_size(top.virtual_size)}"))
    if not drop and base is None:
        writes.append(Touch(top.filename, "emptied once the base has everything"))
    room = look_for_room(image, len(layers) - 1, format=format)
    return Plan(
        action=f"commit {top.filename} into {bottom.filename}",
        reads=[Touch(info.filename, "what it stores") for info in layers[:-1]],
        writes=writes,
        moves=data,
        dependents=found,
        warnings=[
            *([f"it will not fit: {room.words()}"] if room is not None else []),
            *(f"{info.filename} will show other data: the commit does not update it" for info in layers[1:-1]),
        ],
        undo="none: the base's present content is overwritten. Take a snapshot of it, or copy it, first",
    )


def layers_to(chain: list[ImageInfo], base: str | None, image: str) -> list[ImageInfo]:
    """Return the images from the top to *base* (None: the one directly below); raises CowhandError where that is not possible."""
    if len(chain) == 1:
        raise InvalidArgument(f"'{image}' has no backing file", path=image)
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

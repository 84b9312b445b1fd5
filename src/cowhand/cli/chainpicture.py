"""The picture of a real chain: opens its images and hands what they hold to :mod:`cowhand.cli.pictures.chain`."""

from __future__ import annotations

import os
from contextlib import ExitStack

import cowhand
from cowhand.cli.pictures.chain import LayerDrawing, picture
from cowhand.cli.pictures.svg import Theme
from cowhand.core.errors import CowhandError
from cowhand.core.extents import DATA, ExtentBatch
from cowhand.core.units import format_size
from cowhand.image.info import ImageInfo


def draw_chain(
    image: str,
    format: str | None,
    chain: list[ImageInfo],
    others: list[list[str]],
    *,
    theme: Theme = "auto",
    force_share: bool = False,
) -> str:
    """Return the SVG of *chain*, which begins with *image*. What cannot be opened is drawn as missing."""
    visible = _visible(image, format, force_share)
    drawings = []
    with ExitStack() as stack:
        for depth, (info, names) in enumerate(zip(chain, others, strict=True)):
            drawings.append(
                LayerDrawing(
                    name=os.path.basename(info.filename) or info.filename,
                    format=info.format,
                    virtual_size=info.virtual_size,
                    stored=info.disk_size,
                    visible=visible.get(depth, 0) if visible is not None else None,
                    batches=() if info.problem else _own(info, stack, force_share),
                    snapshots=[one.name or one.id for one in info.snapshots],
                    others=[os.path.basename(name) for name in names],
                    note=info.problem,
                )
            )
        stored = sum(info.disk_size or 0 for info in chain)
        count = "one image" if len(chain) == 1 else f"a chain of {len(chain)} images"
        return picture(
            drawings, title=drawings[0].name, subtitle=f"{count}, {format_size(stored)} on disk", theme=theme
        )


def _own(info: ImageInfo, stack: ExitStack, force_share: bool) -> list[ExtentBatch]:
    """Return what the image itself stores, without what shows through."""
    share = force_share or bool(info.in_use)
    disk = stack.enter_context(cowhand.open(info.filename, format=info.format, backing=False, force_share=share))
    return list(disk.extents())


def _visible(image: str, format: str | None, force_share: bool) -> dict[int, int] | None:
    """Return how many bytes of the active disk are data of each layer, by its depth; None when it cannot be opened."""
    try:
        disk = cowhand.open(image, format=format, force_share=force_share)
    except CowhandError:
        return None
    found: dict[int, int] = {}
    with disk:
        for batch in disk.extents():
            for length, flags, depth in zip(batch.length, batch.flags, batch.depth, strict=True):
                if flags & DATA:
                    found[depth] = found.get(depth, 0) + length
    return found

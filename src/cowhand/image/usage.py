"""What images use their files for: bytes of data, tables, reference counts, snapshots, bitmaps, and what is lost or free."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.graph.block_status import skip_filters
from cowhand.core.errors import CowhandError, ImageInUse
from cowhand.core.extents import DATA
from cowhand.image.open import open_image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cowhand.block.disk import Disk
    from cowhand.block.opening.policy import Policy


class ImageUsage(NamedTuple):
    """One image. Bytes: ``file_size`` its file's length, ``disk_size`` what that takes on its medium (None: nobody can tell), ``parts`` add up to
    the length. ``data_file``: (name, length, bytes on its medium) of a file that holds the guest's data, or None. ``problem``: why nothing
    is known of it, or "". ``uncertain``: reference counts are being changed, or were not written: "leaked" and "free" may be wrong."""

    filename: str
    format: str = ""
    virtual_size: int = 0
    file_size: int = 0
    disk_size: int | None = None
    parts: Mapping[str, int] = {}
    data_file: tuple[str, int, int | None] | None = None
    uncertain: bool = False
    problem: str = ""

    def document(self) -> dict[str, Any]:
        """Return it with the keys that JSON output has."""
        if self.problem:
            return {"filename": self.filename, "problem": self.problem}
        out: dict[str, Any] = {
            "filename": self.filename,
            "format": self.format,
            "virtual-size": self.virtual_size,
            "file-size": self.file_size,
            "actual-size": self.disk_size,
            "parts": dict(self.parts),
            "uncertain": self.uncertain,
        }
        if self.data_file is not None:
            name, length, actual = self.data_file
            out["data-file"] = {"filename": name, "file-size": length, "actual-size": actual}
        return out


def image_usage(
    path: str | os.PathLike[str], *, format: str | None = None, force_share: bool = False, policy: Policy | None = None
) -> ImageUsage:
    """Return what the image at *path* uses its file for; nothing under it is opened. Raises CowhandError."""
    in_use = False
    try:
        disk = open_image(path, format=format, backing=False, force_share=force_share, policy=policy)
    except ImageInUse:
        in_use = True
        disk = open_image(path, format=format, backing=False, force_share=True, policy=policy)
    with disk:
        return _describe(disk, in_use or force_share)


def chain_usage(
    path: str | os.PathLike[str], *, format: str | None = None, force_share: bool = False, policy: Policy | None = None
) -> list[ImageUsage]:
    """Return the same of an image and of every one below it, the active one first; one that cannot be opened ends the list, and says why."""
    from cowhand.image.info import chain_info

    found = []
    for info in chain_info(path, format=format, force_share=force_share, policy=policy):
        if info.problem:
            found.append(ImageUsage(info.filename, info.format, problem=info.problem))
            continue
        try:
            found.append(image_usage(info.filename, format=info.format, force_share=force_share, policy=policy))
        except CowhandError as error:
            found.append(ImageUsage(info.filename, info.format, problem=error.message))
    return found


def _describe(disk: Disk, in_use: bool) -> ImageUsage:
    node: Any = skip_filters(disk.root)
    below = node
    while below.primary is not None:
        below = below.primary.node
    length = below.size
    if node.driver == "qcow2":
        from cowhand.block.formats.qcow2.check.usage import usage

        parts = usage(node)
        dirty = bool(node.header.incompatible & 1)
    else:
        data = sum(row.length for batch in disk.extents(depth=1) for row in batch if row.flags & DATA)
        data = min(data, length)
        parts, dirty = {"data": data, "free": length - data}, False
    data_file = None
    outside = getattr(node, "data_child", None)
    if outside is not None and outside is not node.primary:
        apart = outside.node
        data_file = (apart.filename, apart.size, apart.allocated_size())
    return ImageUsage(
        node.filename, node.driver, node.size, length, below.allocated_size(), parts, data_file, in_use or dirty
    )

"""Opening what a copy reads: a name, a description, or a disk that the caller has open already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

from cowhand.block.disk import Disk
from cowhand.core.errors import NotSupported

if TYPE_CHECKING:
    from cowhand.block.policy import Policy

#: What the public functions take as an image.
Image: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Disk"


def open_source(
    what: Image,
    stack: ExitStack,
    format: str | None = None,
    *,
    snapshot: str | None = None,
    cache: str = "writeback",
    force_share: bool = False,
    policy: Policy | None = None,
) -> Disk:
    """Return *what* open for reading; *stack* closes what was opened here, and leaves the caller's own disk open.

    *snapshot* shows the image as it was at the internal snapshot of that id or name.
    """
    if isinstance(what, Disk):
        disk = what
    else:
        import cowhand

        disk = cowhand.open(what, format=format, cache=cache, force_share=force_share, policy=policy)
        stack.enter_context(disk)
    if snapshot is None:
        return disk
    view = getattr(disk.root, "snapshot_view", None)
    if view is None:
        raise NotSupported(f"format '{disk.format}' has no internal snapshots", path=disk.filename)
    return stack.enter_context(Disk(view(snapshot)))

"""Opening what a copy reads: a name, a description, or a disk that the caller has open already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import CONSISTENT_READ, WRITE_UNCHANGED
from cowhand.core.errors import CowhandError, NotSupported, SnapshotNotFound

if TYPE_CHECKING:
    from cowhand.block.opening.policy import Policy

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
    unshared: bool = False,
    policy: Policy | None = None,
) -> Disk:
    """Return *what* open for reading; *stack* closes what was opened here, and leaves the caller's own disk open.

    *unshared* keeps everybody, this process too, from writing what was opened here: no source is its own target. *snapshot* shows the image as
    it was at the internal snapshot of that id or name.
    """
    if isinstance(what, Disk):
        disk = what
    else:
        import cowhand

        disk = cowhand.open(what, format=format, cache=cache, force_share=force_share, policy=policy)
        stack.enter_context(disk)
        if unshared and not force_share:
            graph.set_permissions(disk.edge, disk.edge.perm, CONSISTENT_READ | WRITE_UNCHANGED)
    if snapshot is None:
        return disk
    from cowhand.image.snapshots import open_snapshot

    try:
        return stack.enter_context(open_snapshot(disk, snapshot))
    except CowhandError as error:
        if isinstance(error, SnapshotNotFound):
            error.qemu_message = "Can't find snapshot"
        elif isinstance(error, NotSupported):
            error.qemu_message = f"Block format '{disk.format}' used by device '' does not support temporarily loading internal snapshots"
        raise error.within(f"snapshot '{snapshot}' of '{disk.filename}'", qemu="Failed to load snapshot") from None

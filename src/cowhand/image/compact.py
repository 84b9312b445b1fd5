"""Making an image's file shorter in place: what lies at its end moves into the gaps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.graph.changes import insert_filter
from cowhand.block.opening.opening import Opening
from cowhand.core.errors import NotSupported
from cowhand.core.malloc_tuning import expect_arrays
from cowhand.core.progress import CancelToken, Progress

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.compact.compact import Compaction


def compact(
    what: str | os.PathLike[str],
    *,
    format: str | None = None,
    options: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Compaction:
    """Compact the qcow2 image *what*, which nobody else has open, or with *dry_run* say what that would do.

    The guest's content and the snapshots stay as they are. Cancelled or crashed at any point the image is sound but for lost space, and calling it
    again goes on. *options* are those of opening, such as an encrypted image's ``encrypt.key-secret``. Raises NotSupported for other formats,
    ImageCorrupt for a damaged image, and what opening raises.
    """
    from cowhand.drivers import REGISTRY

    opening = Opening(REGISTRY, backing=False)
    opening.for_repair = True
    root: Any = opening.open(what, format=format, options={"read-only": dry_run, **(options or {})})
    try:
        disk = Disk(root, writable=not dry_run)
    except BaseException:
        opening.abandon()
        raise
    with disk:
        if root.driver != "qcow2":
            raise NotSupported(f"images of format '{root.driver}' cannot be compacted", path=root.filename)
        from cowhand.block.formats.qcow2.compact.compact import Compactor

        expect_arrays(8 * root.file.node.size // root.cluster_size)
        with graph.quiesce(root):
            if dry_run:
                _rehearse(root)
            return Compactor(root, progress, cancel).run(rehearsal=dry_run)


def _rehearse(root: Any) -> None:
    """Have *root*, which was opened for reading, write to a node that keeps it for itself."""
    from cowhand.image.shadow.pages import TrialNode

    below = root.file.node
    edge = root.file
    insert_filter(TrialNode(below), below, [edge])
    root.writable = True

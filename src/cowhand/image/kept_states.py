"""Internal snapshots that show something of what lies under their image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowhand.block.graph import graph
from cowhand.block.graph.block_status import layered, skip_filters
from cowhand.block.node.guard import KeptState, files_of
from cowhand.core.errors import CowhandError, NotSupported
from cowhand.core.extents import ALLOCATED

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode


def states_over(node: BlockNode) -> Iterator[KeptState]:
    """Yield the internal snapshots of *node*'s image that show something of what lies under the image, or may."""
    holder = skip_filters(node)
    try:
        snapshots = holder.list_snapshots()
    except NotSupported:
        return
    path = next(iter(files_of(holder)), holder.filename)
    for one in snapshots:
        try:
            view = holder.open_snapshot(one.id, one.name)
            try:
                shows = _shows_below(view)
            finally:
                graph.close_node(view)
        except CowhandError:
            shows = True  # its tables cannot be read: what they would show is not known
        if shows:
            yield KeptState(path, one.name or one.id)


def _shows_below(view: BlockNode) -> bool:
    """Tell whether *view* leaves any of its bytes to a layer below, or would if there were one."""
    position = 0
    while position < view.size:
        batch = layered(view, position, view.size - position, 1)
        if not all(flags & ALLOCATED for flags in batch.flags):
            return True
        position = batch.end
    return False

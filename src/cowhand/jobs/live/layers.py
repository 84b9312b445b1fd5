"""The layers of an open chain, as jobs name and link them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cowhand.block.disk import Disk
from cowhand.block.graph.block_status import skip_filters
from cowhand.block.graph.reopen import reopen
from cowhand.block.node.node import BlockNode, Child
from cowhand.core.errors import InvalidArgument


def layers_above(top: BlockNode, base: BlockNode | None) -> list[BlockNode]:
    """Return the layers from *top* down to the one above *base*, or to the last (None). Raises InvalidArgument where *base* is not below *top*."""
    wanted = None if base is None else skip_filters(base)
    found = [skip_filters(top)]
    while True:
        below = found[-1].backing
        layer = None if below is None else skip_filters(below.node)
        if layer is wanted:
            return found
        if layer is None:
            assert base is not None
            raise InvalidArgument(
                f"'{base.filename}' is not in the backing chain of '{top.filename}'",
                qemu=f"Can't find '{base.filename}' in the backing chain", path=base.filename,
            )  # fmt: skip
        found.append(layer)


@contextmanager
def writable_meanwhile(node: BlockNode) -> Iterator[None]:
    """Have *node*, which may be open for reading only, open for writing while the ``with`` block runs. Raises what reopening raises."""
    if node.writable:
        yield
        return
    with Disk(node, name=f"{node.name} meanwhile") as disk:
        reopen(disk, writable=True)
        try:
            yield
        finally:
            disk.flush()
            reopen(disk, writable=False)


def overlays_of(node: BlockNode) -> list[Child]:
    """Return the edges by which other images have *node*, or a filter over it, as their backing file."""
    found: list[Child] = []
    pending = [node]
    while pending:
        for edge in pending.pop().parents:
            if not isinstance(edge, Child):
                continue
            if edge.name == "backing":
                found.append(edge)
            elif edge.parent.is_filter:
                pending.append(edge.parent)
    return found

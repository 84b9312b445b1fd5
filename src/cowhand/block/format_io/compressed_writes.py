"""Writing guest data compressed, unit by unit, into formats that can keep it so.

A format that can has a ``codec`` and takes encoded units by :meth:`FormatNode.write_compressed`.
"""

from __future__ import annotations

from typing import Any

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.node.node import BlockNode, Edge
from cowhand.core.errors import InvalidArgument, IOFailed, NotSupported
from cowhand.core.extents import DATA


def can_compress(node: BlockNode) -> bool:
    """Tell whether *node* can store what is written to it compressed."""
    return isinstance(node, FormatNode) and hasattr(type(node), "codec")


def write_compressed(node: FormatNode, edge: Edge, offset: int, data: memoryview) -> None:
    """Store whole allocation units of *node*, which *edge* leads to; the last may be cut off by the disk's end.

    A unit that compressing does not make smaller is stored as it is. Raises InvalidArgument for parts of units, IOFailed where data is already.
    """
    codec: Any = getattr(node, "codec")  # noqa: B009 - the interface of formats does not have it
    if getattr(node, "external", False):
        raise NotSupported("an image keeps nothing compressed in a data file of its own", path=node.filename)
    unit = node.allocation_unit
    end = offset + len(data)
    if offset % unit or (end % unit and end != node.size):
        raise InvalidArgument("compressed data is written in whole clusters", path=node.filename, offset=offset)
    for position in range(0, len(data), unit):
        part = data[position : position + unit]
        if node.map(offset + position, unit)[1] & DATA:
            raise IOFailed(
                "compressed data can only be written where nothing is", path=node.filename, offset=offset + position
            )
        payload = codec.compress(bytes(part).ljust(unit, b"\0"))
        if payload is None:
            edge.write(offset + position, (part,))
            continue
        try:
            node.write_compressed(offset + position, payload)
        finally:
            # Not by way of the edge, which knows of no such request.
            for hook in node.hooks:
                hook(offset + position, len(part))

"""Recording another backing file in a qcow2 header."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.graph import graph
from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def change_backing(node: Qcow2Node, name: str | None, format: str | None) -> None:
    """Write *name* and *format* into *node*'s header; on an error the old ones stand."""
    node.check_writable()
    if name and node.raw_data:
        raise InvalidArgument(
            "an image with a raw data file cannot have a backing file", qemu="Invalid argument", path=node.filename
        )
    with graph.quiesce(node):
        node.flush()
        with node.rewriting_header() as header:
            header.backing_name, header.backing_format = name or None, format if name else None

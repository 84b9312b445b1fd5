"""Recording another backing file in a qcow2 header."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block import graph
from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def change_backing(node: Qcow2Node, name: str | None, format: str | None) -> None:
    """Write *name* and *format* into *node*'s header; on an error the old ones stand."""
    node.check_writable()
    header = node.header
    if name and node.raw_data:
        raise InvalidArgument(
            "an image with a raw data file cannot have a backing file", qemu="Invalid argument", path=node.filename
        )
    before = header.backing_name, header.backing_format
    with graph.quiesce(node):
        node.flush()
        with node.exclusive():
            old = header.encode()
            header.backing_name, header.backing_format = name or None, format if name else None
            try:
                header.encode()  # raises when there is no room, before anything is written
                with node.publishing(0, old):
                    node.update_header()
                    node.flush_file()
            except BaseException:
                header.backing_name, header.backing_format = before
                raise

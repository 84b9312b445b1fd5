"""Recording another backing file in a qcow2 header."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block import graph

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def change_backing(node: Qcow2Node, name: str | None, format: str | None) -> None:
    """Write *name* and *format* into *node*'s header; on an error the old ones stand."""
    node.check_writable()
    header = node.header
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

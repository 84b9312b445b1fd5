"""Nodes by name: the table of a monitor or a program that refers to nodes, and the owners that keep unused ones open.

Source: QEMU ``qapi/block-core.json``, ``blockdev-add`` and ``blockdev-del``; names as in ``bdrv_assign_node_name``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

from cowhand.block.graph import graph
from cowhand.block.graph.users import OwnerEdge, UserEdge
from cowhand.block.node.node import ALL_PERMISSIONS, BlockNode
from cowhand.core.errors import InvalidArgument

#: QEMU's rule for the names of nodes that users give.
_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*\Z")
LONGEST_NAME = 31


def check_name(name: str) -> None:
    """Raise InvalidArgument unless *name* is one that a user may give a node."""
    if len(name) > LONGEST_NAME:
        raise InvalidArgument("Node name too long")
    if not _NODE_NAME.match(name):
        raise InvalidArgument(f"Invalid node-name: '{name}'")


class NodeNames:
    """The nodes of one program or monitor, each name once, in the order in which they were made. Thread-safe."""

    def __init__(self, keeper: str = "monitor") -> None:
        self._keeper = keeper
        self._lock = threading.Lock()
        self._nodes: dict[str, BlockNode] = {}
        self._owners: dict[str, OwnerEdge] = {}

    def __iter__(self) -> Iterator[BlockNode]:
        with self._lock:
            return iter(list(self._nodes.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    def find(self, name: str) -> BlockNode | None:
        """Return the node of that name, None where there is none."""
        return self._nodes.get(name)

    def get(self, name: str) -> BlockNode:
        """Return the node of that name. Raises InvalidArgument."""
        node = self.find(name)
        if node is None:
            raise InvalidArgument(f"Failed to find node with node-name='{name}'")
        return node

    def add(self, node: BlockNode) -> None:
        """Make *node* known by its name until it is closed. Raises InvalidArgument where another one has it."""
        with self._lock:
            if self._nodes.setdefault(node.name, node) is not node:
                raise InvalidArgument(f"Duplicate nodes with node-name='{node.name}'")
        node.table = self

    def forget(self, node: BlockNode) -> None:
        """Take *node* out; closing does so by itself."""
        with self._lock:
            if self._nodes.get(node.name) is node:
                del self._nodes[node.name]
                self._owners.pop(node.name, None)

    # -- owners

    def own(self, node: BlockNode) -> None:
        """Keep *node* open although nothing uses it, until :meth:`disown`."""
        edge = OwnerEdge(self._keeper)
        graph.attach_disk(edge, node, 0, ALL_PERMISSIONS)
        with self._lock:
            self._owners[node.name] = edge

    def owns(self, node: BlockNode) -> bool:
        """Tell whether *node* is kept open by :meth:`own`."""
        return node.name in self._owners and self._nodes.get(node.name) is node

    def release(self, node: BlockNode) -> None:
        """End :meth:`own`, also of a node that is in use; it is closed where nothing uses it."""
        with self._lock:
            edge = self._owners.pop(node.name, None)
        if edge is not None:
            graph.detach(edge)

    def disown(self, node: BlockNode) -> None:
        """Let *node* go; it is closed where nothing uses it. Raises InvalidArgument where it was not owned or is in use."""
        if not self.owns(node):
            raise InvalidArgument(f"Node {node.name} is not owned by the {self._keeper}")
        for edge in node.parents:
            if edge.is_child and edge.name == "backing":
                raise InvalidArgument(
                    f"Node '{node.name}' is busy: node is used as backing hd of '{edge.owner.filename}'"
                )
            if edge.is_child or isinstance(edge, UserEdge):
                raise InvalidArgument(
                    f"Block device {node.name} is in use", hint=f"End its use by '{edge.owner.name}' first."
                )
        with self._lock:
            edge = self._owners.pop(node.name)
        graph.detach(edge)

"""Blockers: operations on a node that are refused while something else relies on it, apart from permissions (QEMU: op blockers)."""

from __future__ import annotations

from cowhand.block.node.node import BlockNode
from cowhand.core.errors import NodeBusy


class Blocker:
    """What keeps operations away from nodes, and the reason in QEMU's words ("block device is in use by block job: backup").

    Operations are QEMU's names for them: "resize", "mirror-source", "backup-target", ... Not thread-safe by itself: it
    is set and tested by whoever holds the control of the graph.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self._nodes: list[tuple[BlockNode, frozenset[str]]] = []

    def block(self, node: BlockNode, *but: str) -> None:
        """Refuse all operations on *node* but those named."""
        self._nodes.append((node, frozenset(but)))
        node.blockers = (*node.blockers, self)

    def refuses(self, node: BlockNode, operation: str) -> bool:
        """Tell whether *operation* on *node* is refused by this one."""
        return any(known is node and operation not in but for known, but in self._nodes)

    def release(self) -> None:
        """Allow everything again."""
        for node, _ in self._nodes:
            node.blockers = tuple(known for known in node.blockers if known is not self)
        self._nodes.clear()


def check_blockers(node: BlockNode, operation: str) -> None:
    """Raise NodeBusy where *operation* on *node* is refused."""
    for blocker in node.blockers:
        if blocker.refuses(node, operation):
            raise NodeBusy(f"Node '{node.name}' is busy: {blocker.reason}", path=node.filename)

"""Permissions: what users do with a node, what they let others do, and how both are carried down to the image locks.

Source: QEMU's permission system (``docs/devel/block-coroutine-wrapper``, ``include/block/block-common.h``: ``BLK_PERM_*``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from cowhand.block.node.node import ALL_PERMISSIONS, PERMISSION_NAMES, BlockNode, Edge
from cowhand.core.errors import PermissionConflict
from cowhand.core.locks import RANK_GRAPH, ranked_lock

#: Held while the shape of the graph or the permissions of its edges change; not over I/O of data or metadata.
lock = ranked_lock(RANK_GRAPH, "graph")


def set_permissions(edge: Edge, perm: int, shared: int) -> None:
    """Give *edge* its permissions and carry the consequences down; on an error everything is as before.

    Takes the graph's lock. Raises PermissionConflict, ImageInUse.
    """
    with lock:
        carry_down([(edge, perm, shared)])


def refresh(node: BlockNode) -> None:
    """Recompute what *node*'s users need, tell the node, and do the same for its children. Takes the graph's lock."""
    with lock:
        carry_down((), (node,))


def describe_user(edge: Edge) -> str:
    """Name the user of a node behind *edge*, for an error message."""
    owner = edge.owner
    if isinstance(owner, BlockNode):
        return f"'{owner.name}' ({owner.driver}, as {edge.name})"
    return f"disk '{owner.name}'"


def required(node: BlockNode) -> tuple[int, int]:
    """Return (needed, shared) permissions of all users of *node* together."""
    perm, shared = 0, ALL_PERMISSIONS
    for edge in node.parents:
        perm |= edge.perm
        shared &= edge.shared
    return perm, shared


def carry_down(edges: Iterable[tuple[Edge, int, int]], nodes: Iterable[BlockNode] = ()) -> None:
    """Give *edges* their (needed, shared) permissions, and all that stand below them and below *nodes* what follows: all, or nothing.

    The lock is held. First everything is worked out, then checked for conflicts, then the nodes are told, parents
    before children: image locks go from the old state to the new one at once, and are not let go of between.
    """
    before: dict[Edge, tuple[int, int]] = {}
    affected: dict[int, BlockNode] = {}
    told: list[BlockNode] = []
    try:
        pending = list(nodes)
        for edge, perm, shared in edges:
            before.setdefault(edge, (edge.perm, edge.shared))
            edge.perm, edge.shared = perm, shared
            pending.append(edge.node)
        while pending:
            node = pending.pop()
            affected.pop(id(node), None)  # told after the parents that were found later
            affected[id(node)] = node
            perm, shared = required(node)
            for child in node.children.values():
                wanted = node.child_permissions(child, perm, shared)
                if wanted != (child.perm, child.shared):
                    before.setdefault(child, (child.perm, child.shared))
                    child.perm, child.shared = wanted
                    pending.append(child.node)
        for edge in before:  # what is new first: the error names who was there before
            _check_conflict(edge, edge.perm, edge.shared)
        for node in affected.values():
            check_conflicts(node)
        for node in affected.values():
            told.append(node)
            node.update_permissions(*required(node))
    except BaseException:
        for edge, (perm, shared) in before.items():
            edge.perm, edge.shared = perm, shared
        for node in told:
            with contextlib.suppress(Exception):
                node.update_permissions(*required(node))
        raise


def check_conflicts(node: BlockNode) -> None:
    """Raise PermissionConflict where two users of *node* exclude one another. The lock is held."""
    perm, shared = required(node)
    if not perm & ~shared:
        return
    for edge in node.parents:
        _check_conflict(edge, edge.perm, edge.shared)


def _check_conflict(edge: Edge, perm: int, shared: int) -> None:
    for other in edge.node.parents:
        if other is edge:
            continue
        for wanted, text in (
            (perm & ~other.shared, "does not share"),
            (other.perm & ~shared, "uses what would be refused:"),
        ):
            if wanted:
                names = ", ".join(name for bit, name in PERMISSION_NAMES.items() if wanted & bit)
                raise PermissionConflict(
                    f"node '{edge.node.name}' is in use: {describe_user(other)} {text} {names}",
                    path=edge.node.filename,
                    hint="End the other use first, or open this one for reading only.",
                )

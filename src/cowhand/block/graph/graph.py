"""The graph: edges with permissions, quiesce, live replacement, hooks.

Shape changes only under one lock (rank GRAPH) and, for nodes in use, only while the disks above are quiesced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cowhand.block.access.aligned import AlignedAccess
from cowhand.block.access.hooked import HookedAccess
from cowhand.block.graph.users import GraphUser, UserEdge
from cowhand.block.node.node import ALL_PERMISSIONS, PERMISSION_NAMES, BlockNode, Child, Edge, Hook, Role, walk
from cowhand.core.errors import InvalidArgument, PermissionConflict
from cowhand.core.locks import RANK_GRAPH, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.access.zero_detection import DetectingAccess

_lock = ranked_lock(RANK_GRAPH, "graph")

#: Seconds that quiesce waits for requests in flight before it says who stays.
QUIESCE_DEADLINE = 30.0


def bind(edge: Edge) -> None:
    """Set the methods of *edge* to the shortest way to its node: padded only where alignments differ, hooked only where hooks are."""
    node = edge.node
    access: BlockNode | HookedAccess | DetectingAccess = node
    if node.hooks:
        access = HookedAccess(node)
    if node.options.detect_zeroes != "off" and not node.detects_zeroes:
        from cowhand.block.access.zero_detection import DetectingAccess

        access = DetectingAccess(node, access)
    if node.limits.request_alignment > edge.granularity:
        padded = AlignedAccess(node, access)
        edge.lane = None
        _set_methods(edge, padded)
    else:
        edge.lane = node if access is node else None
        _set_methods(edge, access)


def _set_methods(edge: Edge, access: BlockNode | HookedAccess | DetectingAccess | AlignedAccess) -> None:
    edge.read_into = access.read_into
    edge.write = access.write
    edge.write_zeroes = access.write_zeroes
    edge.discard = access.discard
    edge.flush = edge.node.flush
    edge.submit = access.submit


def describe(edge: Edge) -> str:
    """Name the user behind *edge* for an error message."""
    owner = edge.owner
    return (
        f"'{owner.name}' ({owner.driver}, as {edge.name})" if isinstance(owner, BlockNode) else f"disk '{owner.name}'"
    )


def _check_conflict(edge: Edge, perm: int, shared: int) -> None:
    for other in edge.node.parents:
        if other is edge:
            continue
        for wanted, refused, text in (
            (perm & ~other.shared, describe(other), "does not share"),
            (other.perm & ~shared, describe(other), "uses what would be refused:"),
        ):
            if wanted:
                names = ", ".join(name for bit, name in PERMISSION_NAMES.items() if wanted & bit)
                raise PermissionConflict(
                    f"node '{edge.node.name}' is in use: {refused} {text} {names}",
                    path=edge.node.filename,
                    hint="End the other use first, or open this one for reading only.",
                )


def set_permissions(edge: Edge, perm: int, shared: int) -> None:
    """Give *edge* its permissions and carry the consequences down; on an error everything is as before."""
    _carry_down([(edge, perm, shared)])


def refresh(node: BlockNode) -> None:
    """Recompute what *node*'s users need, tell the node, and do the same for its children."""
    _carry_down(_tell(node))


def _carry_down(pending: list[tuple[Edge, int, int]]) -> None:
    """Give edges their permissions, and what follows from that, down to the last child: all of it, or nothing.

    Without recursion, since a chain may be longer than Python's stack.
    """
    changed: list[tuple[Edge, int, int]] = []
    try:
        while pending:
            edge, perm, shared = pending.pop()
            _check_conflict(edge, perm, shared)
            changed.append((edge, edge.perm, edge.shared))
            edge.perm, edge.shared = perm, shared
            pending.extend(_tell(edge.node))
    except BaseException:
        for edge, perm, shared in reversed(changed):
            edge.perm, edge.shared = perm, shared
        for edge, _, _ in changed:
            with contextlib.suppress(Exception):
                _tell(edge.node)
        raise


def _tell(node: BlockNode) -> list[tuple[Edge, int, int]]:
    """Tell *node* what its users need, and return what changes by that for its children's edges."""
    perm, shared = 0, ALL_PERMISSIONS
    for edge in node.parents:
        perm |= edge.perm
        shared &= edge.shared
    node.update_permissions(perm, shared)
    changes: list[tuple[Edge, int, int]] = []
    for child in node.children.values():
        need, share = node.child_permissions(child, perm, shared)
        if (need, share) != (child.perm, child.shared):
            changes.append((child, need, share))
    return changes


def attach(parent: BlockNode, name: str, node: BlockNode, role: Role) -> Child:
    """Make *node* the child *name* of *parent*, with the permissions that the role needs, before any I/O is done through it."""
    if name in parent.children:
        raise InvalidArgument(f"node '{parent.name}' has a child '{name}' already")
    with _lock:
        child = Child(parent, name, role)
        child.node = node
        node.parents.append(child)
        parent.children[name] = child
        bind(child)
        perm, shared = 0, ALL_PERMISSIONS
        for edge in parent.parents:
            perm |= edge.perm
            shared &= edge.shared
        try:
            set_permissions(child, *parent.child_permissions(child, perm, shared))
        except BaseException:
            node.parents.remove(child)
            del parent.children[name]
            raise
    return child


def attach_disk(edge: Edge, node: BlockNode, perm: int, shared: int) -> None:
    """Point a disk's *edge* at *node*."""
    with _lock:
        edge.node = node
        node.parents.append(edge)
        bind(edge)
        try:
            set_permissions(edge, perm, shared)
        except BaseException:
            node.parents.remove(edge)
            raise


def detach(edge: Edge) -> None:
    """Take *edge* away; its node is closed, with what hangs below, when nobody else uses it."""
    with _lock:
        _detach(edge)


def release(edge: Edge) -> None:
    """Take *edge* away and leave its node open, for whoever made it."""
    with _lock:
        edge.node.parents.remove(edge)
        if isinstance(edge, Child):
            edge.parent.children.pop(edge.name, None)
        refresh(edge.node)


def _detach(edge: Edge) -> None:
    if _unhook(edge):
        close_node(edge.node)


def _unhook(edge: Edge) -> bool:
    """Take *edge* away and tell whether nobody else uses its node, which is then to be closed."""
    node = edge.node
    if edge in node.parents:
        node.parents.remove(edge)
    if isinstance(edge, Child):
        edge.parent.children.pop(edge.name, None)
    if node.parents or node.closed:
        if not node.closed:
            with contextlib.suppress(Exception):
                refresh(node)
        return False
    return True


def close_node(node: BlockNode) -> None:
    """Close an unused *node*, then release its children. The first error is raised after everything is closed."""
    failure: BaseException | None = None
    pending = [node]
    while pending:
        current = pending.pop()
        current.closed = True
        try:
            current.close()
        except Exception as error:  # noqa: BLE001 - kept, and raised at the end
            failure = failure or error
        pending.extend(child.node for child in reversed(list(current.children.values())) if _unhook(child))
    if failure is not None:
        raise failure


def rebind_parents(node: BlockNode) -> None:
    """Recompute the ways to *node* after its limits or hooks changed."""
    for edge in node.parents:
        bind(edge)


def disks_above(nodes: Iterable[BlockNode]) -> list[GraphUser]:
    """Return the disks from which requests can reach any of *nodes*."""
    found: dict[int, GraphUser] = {}
    seen: set[int] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for edge in list(node.parents):
            if isinstance(edge, UserEdge):
                found[id(edge.user)] = edge.user
            elif isinstance(edge, Child):
                stack.append(edge.parent)
    # Always in the same order: two threads that quiesce the same disks do not wait for one another.
    return [found[key] for key in sorted(found)]


@contextlib.contextmanager
def quiesce(*nodes: BlockNode, deadline: float = QUIESCE_DEADLINE) -> Iterator[None]:
    """Hold back all new requests to *nodes* and wait until none is in flight, for the length of the ``with`` block.

    Requests of the calling thread pass. Raises DeadlineExceeded naming the requests that stay; then everything runs on as before.
    """
    held: list[GraphUser] = []
    disks = disks_above(nodes)
    hurried = [node for node in walk(disk.root for disk in disks) if node.delays]
    try:
        for node in hurried:
            node.hurry(True)
        for disk in disks:
            disk.gate.shut(deadline)
            held.append(disk)
        yield
    finally:
        for node in hurried:
            node.hurry(False)
        for disk in reversed(held):
            disk.gate.open()


def replace_root(disk: GraphUser, node: BlockNode) -> BlockNode:
    """Make *node* what *disk* reads and writes, live; the old root is flushed, released and returned (closed if nobody else uses it).

    Requests that began before have ended in the old root; those that come after see only the new one.
    """
    edge = disk.edge
    while True:
        old = edge.node
        if old is node:
            return old
        with quiesce(old, node):
            # Somebody else may have replaced it before the gate was ours.
            if edge.node is old:
                _swap_root(disk, old, node)
                return old


def _swap_root(disk: GraphUser, old: BlockNode, node: BlockNode) -> None:
    edge = disk.edge
    if not disk.read_only:
        old.settle()
    with _lock:
        # Taken away first: the disk does not conflict with itself where the old root lies below the new one.
        old.parents.remove(edge)
        node.parents.append(edge)
        edge.node = node
        try:
            set_permissions(edge, edge.perm, edge.shared)
        except BaseException:
            node.parents.remove(edge)
            edge.node = old
            old.parents.append(edge)
            with contextlib.suppress(Exception):
                refresh(old)
            raise
        bind(edge)
        disk.root_changed()
        if old.parents:
            refresh(old)
        elif not old.closed:
            close_node(old)


def insert_above(node: BlockNode, edges: Iterable[Edge], upper: BlockNode) -> None:
    """Point *edges*, users of *node*, at *upper* (a filter or overlay that has *node* below it). Inside a quiesce."""
    with _lock:
        for edge in list(edges):
            node.parents.remove(edge)
            edge.node = upper
            upper.parents.append(edge)
            bind(edge)
        refresh(upper)
        refresh(node)


def add_hook(node: BlockNode, hook: Hook) -> None:
    """Call *hook* after every write, zero and discard of *node* from now on. The hook must not do I/O or block."""
    with quiesce(node), _lock:
        node.hooks = (*node.hooks, hook)
        rebind_parents(node)


def remove_hook(node: BlockNode, hook: Hook) -> None:
    """Stop calling *hook*."""
    with quiesce(node), _lock:
        node.hooks = tuple(known for known in node.hooks if known is not hook)
        rebind_parents(node)

"""The graph: attaching and releasing edges, draining, replacing a disk's root, hooks.

The shape changes only under one lock (rank GRAPH; :mod:`cowhand.block.graph.permissions`) and, for nodes in use, only
while the disks above are drained. Nodes are closed outside the lock: writing back and flushing one holds up no other.
Moves of edges that belong together are one :class:`cowhand.block.graph.changes.GraphChange`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from cowhand.block.access.bind import bind, rebind_parents
from cowhand.block.graph.drain import Drain
from cowhand.block.graph.permissions import carry_down, lock, refresh, required, set_permissions
from cowhand.block.graph.users import GraphUser, UserEdge
from cowhand.block.node.node import BlockNode, Child, Edge, Hook, Role, walk
from cowhand.core.errors import Closed, InvalidArgument

__all__ = [
    "attach", "attach_disk", "add_hook", "bind", "close_node", "detach", "disks_above", "quiesce", "rebind_parents",
    "refresh", "release", "remove_hook", "replace_root", "set_permissions",
]  # fmt: skip

#: Seconds that quiesce waits for requests in flight before it says who stays.
QUIESCE_DEADLINE = 30.0


def attach(parent: BlockNode, name: str, node: BlockNode, role: Role) -> Child:
    """Make *node* the child *name* of *parent*, with the permissions that the role needs, before any I/O is done through it.

    Raises InvalidArgument when there is such a child, Closed, PermissionConflict, ImageInUse.
    """
    if name in parent.children:
        raise InvalidArgument(f"node '{parent.name}' has a child '{name}' already")
    with lock:
        check_usable(node)
        child = Child(parent, name, role)
        child.node = node
        node.parents.append(child)
        parent.children[name] = child
        bind(child)
        try:
            carry_down([(child, *parent.child_permissions(child, *required(parent)))])
        except BaseException:
            node.parents.remove(child)
            del parent.children[name]
            raise
    return child


def check_usable(node: BlockNode) -> None:
    """Raise Closed where *node* was closed, or is being closed. The lock is held."""
    if node.closed and not node.outlives_closing:
        raise Closed(f"node '{node.name}' is closed", path=node.filename)


def attach_disk(edge: Edge, node: BlockNode, perm: int, shared: int) -> None:
    """Point a disk's *edge* at *node*."""
    with lock:
        check_usable(node)
        edge.node = node
        node.parents.append(edge)
        bind(edge)
        try:
            carry_down([(edge, perm, shared)])
        except BaseException:
            node.parents.remove(edge)
            raise


def detach(edge: Edge) -> None:
    """Take *edge* away; its node is closed, with what hangs below, when nobody else uses it."""
    with lock:
        unused = unhook(edge)
    if unused:
        close_node(edge.node)


def release(edge: Edge) -> None:
    """Take *edge* away and leave its node open, for whoever made it."""
    with lock:
        edge.node.parents.remove(edge)
        if edge.is_child:
            edge.owner.children.pop(edge.name, None)
        carry_down((), (edge.node,))


def unhook(edge: Edge) -> bool:
    """Take *edge* away and tell whether nobody else uses its node, which is then to be closed. The lock is held."""
    node = edge.node
    if edge in node.parents:
        node.parents.remove(edge)
    if edge.is_child:
        edge.owner.children.pop(edge.name, None)
    if node.parents or node.closed:
        if not node.closed:
            with contextlib.suppress(Exception):
                carry_down((), (node,))
        return False
    node.closed = True  # from now on nobody can attach to it
    return True


def close_node(node: BlockNode) -> None:
    """Close an unused *node*, then release its children. The first error is raised after everything is closed.

    Called without the graph's lock.
    """
    failure: BaseException | None = None
    pending = [node]
    while pending:
        current = pending.pop()
        current.closed = True
        try:
            current.close()
        except Exception as error:  # noqa: BLE001 - kept, and raised at the end
            failure = failure or error
        if current.table is not None:
            current.table.forget(current)
        with lock:
            unused = [child.node for child in reversed(list(current.children.values())) if unhook(child)]
        pending.extend(unused)
    if failure is not None:
        raise failure


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
    # Always in the same order: two threads that drain the same disks do not wait for one another.
    return [found[key] for key in sorted(found)]


@contextlib.contextmanager
def quiesce(*nodes: BlockNode, deadline: float = QUIESCE_DEADLINE) -> Iterator[None]:
    """Hold back all new requests to *nodes* and wait until none is in flight, for the length of the ``with`` block.

    Requests of the calling thread pass. Raises DeadlineExceeded naming the requests that stay; then everything runs on as before.
    """
    disks = disks_above(nodes)
    delaying = [node for node in walk(disk.root for disk in disks) if node.delays]
    try:
        for node in delaying:
            node.hurry(True)
        with Drain(disks).held(deadline):
            yield
    finally:
        for node in delaying:
            node.hurry(False)


def replace_root(disk: GraphUser, node: BlockNode) -> BlockNode:
    """Make *node* what *disk* reads and writes, live; the old root is flushed, released and returned (closed if nobody else uses it).

    Requests that began before have ended in the old root; those that come after see only the new one.
    """
    from cowhand.block.graph.changes import GraphChange

    edge = disk.edge
    while True:
        old = edge.node
        if old is node:
            return old
        with quiesce(old, node):
            # Another thread may have replaced it before the gate was ours.
            if edge.node is old:
                if not disk.read_only:
                    old.settle()
                change = GraphChange()
                change.move(edge, node)
                change.commit()
                return old


def add_hook(node: BlockNode, hook: Hook) -> None:
    """Call *hook* after every write, zero and discard of *node* from now on. The hook must not do I/O or block."""
    with quiesce(node), lock:
        node.hooks = (*node.hooks, hook)
        rebind_parents(node)


def remove_hook(node: BlockNode, hook: Hook) -> None:
    """Stop calling *hook*."""
    with quiesce(node), lock:
        node.hooks = tuple(known for known in node.hooks if known is not hook)
        rebind_parents(node)

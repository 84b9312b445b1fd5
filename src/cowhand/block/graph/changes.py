"""Changes of the graph's shape: moves of edges that happen together, or not at all.

Source: what they may be is QEMU's (``bdrv_replace_node``, ``blockdev-snapshot``, ``blockdev-reopen`` in ``qapi/block-core.json``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Sequence

from cowhand.block.access.bind import bind, refit
from cowhand.block.graph import graph
from cowhand.block.graph.permissions import carry_down, lock, required
from cowhand.block.graph.users import UserEdge
from cowhand.block.node.node import BlockNode, Child, Edge, Role, walk
from cowhand.core.errors import CowhandError, InvalidArgument


class GraphChange:
    """A list of moves, made by one :meth:`commit`: all permissions are worked out for the new shape, and refused as a whole.

    The disks above all nodes concerned are drained by the caller, who also sees to it that what was written through a
    node that is let go of is flushed. For one thread; used once.
    """

    def __init__(self) -> None:
        self._moves: list[tuple[Edge, BlockNode]] = []
        self._attached: list[tuple[BlockNode, str, BlockNode, Role]] = []
        self._detached: list[Child] = []
        self._undo: list[Callable[[], None]] = []

    def move(self, edge: Edge, node: BlockNode) -> None:
        """Point *edge* at *node*."""
        self._moves.append((edge, node))

    def attach(self, parent: BlockNode, name: str, node: BlockNode, role: Role) -> None:
        """Make *node* the child *name* of *parent*, which has none of that name."""
        self._attached.append((parent, name, node, role))

    def detach(self, child: Child) -> None:
        """Take *child* away."""
        self._detached.append(child)

    def commit(self) -> None:
        """Do it. Raises InvalidArgument (a cycle), PermissionConflict, ImageInUse, Closed; then everything is as before.

        Nodes that nobody uses any more are closed afterwards; the first error of that is raised in the end.
        """
        with lock:
            before: dict[int, BlockNode] = {}
            after: dict[int, BlockNode] = {}
            try:
                self._shape(before, after)
                self._permit(before, after)
                for node in list(after.values()):
                    for edge in node.parents:
                        bind(edge)
                self._refit()
            except BaseException:
                self._take_back(before, after)
                raise
            unused = [node for node in before.values() if not node.parents and not node.closed]
            for node in unused:
                node.closed = True
            self._tell_users(after)
        failure: BaseException | None = None
        for node in unused:
            try:
                graph.close_node(node)
            except CowhandError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    # -- the steps, under the lock

    def _shape(self, before: dict[int, BlockNode], after: dict[int, BlockNode]) -> None:
        for child in self._detached:
            before[id(child.node)] = child.node
            after.setdefault(id(child.parent), child.parent)
            self._unhook(child)
        for edge, node in self._moves:
            graph.check_usable(node)
            old = edge.node
            before[id(old)] = old
            after[id(node)] = node
            if isinstance(edge, Child):
                after.setdefault(id(edge.parent), edge.parent)
            self._point(edge, old, node)
        for parent, name, node, role in self._attached:
            graph.check_usable(node)
            if name in parent.children:
                raise InvalidArgument(f"node '{parent.name}' has a child '{name}' already")
            after[id(node)] = node
            after.setdefault(id(parent), parent)
            self._hook(parent, name, node, role)
        for edge, node in [*self._moves, *((parent.children[name], node) for parent, name, node, _ in self._attached)]:
            if isinstance(edge, Child) and any(below is edge.parent for below in walk((node,))):
                raise InvalidArgument(
                    f"Making '{node.name}' a {edge.name} child of '{edge.parent.name}' would create a cycle",
                    path=node.filename,
                )

    def _unhook(self, child: Child) -> None:
        node, parent = child.node, child.parent
        order = list(parent.children.items())
        node.parents.remove(child)
        parent.children.pop(child.name)

        def undo() -> None:
            node.parents.append(child)
            parent.children.clear()
            parent.children.update(order)

        self._undo.append(undo)

    def _point(self, edge: Edge, old: BlockNode, new: BlockNode) -> None:
        old.parents.remove(edge)
        new.parents.append(edge)
        edge.node = new

        def undo() -> None:
            new.parents.remove(edge)
            old.parents.append(edge)
            edge.node = old

        self._undo.append(undo)

    def _hook(self, parent: BlockNode, name: str, node: BlockNode, role: Role) -> None:
        child = Child(parent, name, role)
        child.node = node
        node.parents.append(child)
        parent.children[name] = child

        def undo() -> None:
            node.parents.remove(child)
            parent.children.pop(name, None)

        self._undo.append(undo)

    def _permit(self, before: dict[int, BlockNode], after: dict[int, BlockNode]) -> None:
        """Carry permissions down the new shape."""
        fresh = []
        for parent, name, _, _ in self._attached:
            child = parent.children[name]
            fresh.append((child, *parent.child_permissions(child, *required(parent))))
        carry_down(fresh, {**after, **before}.values())

    def _refit(self) -> None:
        changed = [edge.parent for edge, _ in self._moves if isinstance(edge, Child)]
        changed += [child.parent for child in self._detached]
        changed += [parent for parent, _, _, _ in self._attached]
        for parent in changed:
            refit(parent)

    def _take_back(self, before: dict[int, BlockNode], after: dict[int, BlockNode]) -> None:
        for undo in reversed(self._undo):
            undo()
        with contextlib.suppress(Exception):
            carry_down((), {**before, **after}.values())
        for node in [*before.values(), *after.values()]:
            for edge in node.parents:
                bind(edge)
        with contextlib.suppress(Exception):
            self._refit()

    def _tell_users(self, after: dict[int, BlockNode]) -> None:
        """Have every disk above learn what it stands on now."""
        for disk in graph.disks_above(after.values()):
            disk.root_changed()


def users_of(node: BlockNode, *, but: Container[Edge] = ()) -> list[Edge]:
    """Return the edges of disks and nodes to *node*, without those of owners and without *but*."""
    return [edge for edge in node.parents if (isinstance(edge, UserEdge) or edge.is_child) and edge not in but]


def replace_node(old: BlockNode, new: BlockNode, *, but: Iterable[Edge] = (), flush: bool = True) -> None:
    """Have all users of *old* use *new*, live: all but the edges *but*, and those of *new* itself and of what lies below it.

    *old* is flushed before, unless *flush* is False, and closed where nobody uses it any more. Raises as :meth:`GraphChange.commit`.
    """
    kept = list(but)
    with graph.quiesce(old, new):
        below = {id(node) for node in walk((new,))}
        edges = [edge for edge in users_of(old, but=kept) if not (edge.is_child and id(edge.owner) in below)]
        if flush and old.writable and any(edge.perm for edge in edges):
            old.settle()
        change = GraphChange()
        for edge in edges:
            change.move(edge, new)
        change.commit()


def insert_filter(upper: BlockNode, node: BlockNode, edges: Sequence[Edge] | None = None) -> None:
    """Put *upper*, a filter or overlay that stands over *node* already, between *node* and its users (or *edges* alone), live."""
    with graph.quiesce(node, upper):
        chosen = users_of(node) if edges is None else edges
        below = {id(found) for found in walk((upper,))}
        change = GraphChange()
        for edge in chosen:
            if not (edge.is_child and id(edge.owner) in below):
                change.move(edge, upper)
        change.commit()


def drop_filter(filter: BlockNode) -> None:
    """Take *filter* out, live: its users use its child from now on. It is flushed before, and closed."""
    primary = filter.primary
    if primary is None:
        raise InvalidArgument(f"node '{filter.name}' is no filter", path=filter.filename)
    replace_node(filter, primary.node)

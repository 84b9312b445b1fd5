"""Reopening in place: other options, other caching, for reading only or for writing, for a node and all that hangs below it.

All of it happens, or nothing: every node concerned *prepares* (and may refuse), then all *commit*; what still fails then, a lock that another process
holds or a repair that a format wants, undoes every commit. Requests are held back meanwhile; none is lost, and image locks are never let go of.

Source: QEMU's ``blockdev-reopen`` (``qapi/block-core.json``) for what an option that is not named means: it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cowhand.block.graph import graph
from cowhand.block.graph.users import GraphUser, UserEdge
from cowhand.block.node.node import CONSISTENT_READ, RESIZE, WRITE, BlockNode, Child, Edge, Reopening, Role, walk
from cowhand.block.node.options import NodeOptions, check_zero_detection, declared, flatten, parse
from cowhand.core.errors import InvalidArgument, ReadOnly

#: Common options that a child takes over from its parent, as far as it had the parent's value.
_INHERITED = {"cache.direct": "cache_direct", "cache.no-flush": "cache_no_flush"}
_UNCHANGEABLE = ("driver", "node-name", "force-share")
_REFERENCES = ("file", "backing", "image", "raw", "test", "data-file", "log")


def reopen(
    disk: GraphUser,
    options: Mapping[str, Any] | None = None,
    *,
    writable: bool | None = None,
    write_through: bool | None = None,
    node: BlockNode | None = None,
) -> None:
    """Give the root of *disk* (or *node* below it), and what hangs below, other *options* (QEMU's names, nested or dotted: "file.drop-cache").

    *writable* opens for writing, or for reading only; the disk follows. *write_through* is the disk's. Without either they stay. Raises
    InvalidArgument for what cannot be changed, ReadOnly where somebody needs to write, and what opening raises; then nothing has changed.
    """
    while True:
        root = disk.edge.node
        top = root if node is None else node
        # Everybody who reaches any of the nodes, a disk over a backing file too, is held back.
        with graph.quiesce(root, *walk((top,))):
            if disk.edge.node is root:  # and nobody replaced it before the gates were ours
                _reopen_still(disk, root, top, options or {}, writable)
                if write_through is not None:
                    disk.write_through = write_through
                return


def _reopen_still(
    disk: GraphUser, root: BlockNode, top: BlockNode, options: Mapping[str, Any], writable: bool | None
) -> None:
    before = disk.edge.perm, disk.edge.shared, disk.read_only
    asked = "read-only" in options
    try:
        if writable is False:
            _set_access(disk, False)
        _reopen(
            top,
            options,
            writable,
            lambda: _set_access(disk, root.writable and (bool(writable) or asked or not before[2])),
        )
    except BaseException:
        disk.read_only = before[2]
        graph.set_permissions(disk.edge, before[0], before[1])
        raise
    for other in graph.disks_above((top,)):
        other.root_changed()


def _set_access(disk: GraphUser, writable: bool) -> None:
    perm = CONSISTENT_READ | (WRITE if writable else 0) | (RESIZE if writable and disk.resizable else 0)
    if perm != disk.edge.perm:
        graph.set_permissions(disk.edge, perm, disk.edge.shared)
    disk.read_only = not writable


def _reopen(top: BlockNode, options: Mapping[str, Any], writable: bool | None, then: Callable[[], None]) -> None:
    """Prepare, commit, do *then*, or undo it all."""
    wanted: dict[int, tuple[BlockNode, NodeOptions, bool]] = {}
    _collect(top, flatten(options), writable, None, wanted)
    _check_users(wanted)
    prepared: list[Reopening] = []
    try:
        for node, values, writes in wanted.values():
            prepared.append(node.prepare_reopen(values, writes))
    except BaseException:
        for change in reversed(prepared):
            change.finish()
        raise
    committed: list[Reopening] = []
    try:
        # Children first: what a node can do depends on them.
        for change in reversed(prepared):
            committed.append(change)
            change.commit()
            _refit(change.node)
        for change in committed:
            graph.refresh(change.node)
        for change in committed:
            change.activate()
        then()
    except BaseException:
        for change in committed:
            change.undo()
        for change in committed:
            _refit(change.node)
        for change in committed:
            graph.refresh(change.node)
        raise
    finally:
        for change in prepared:
            change.finish()


def _refit(node: BlockNode) -> None:
    node.refit()
    graph.rebind_parents(node)


def _collect(
    node: BlockNode,
    given: dict[str, Any],
    writable: bool | None,
    parent: tuple[NodeOptions, NodeOptions] | None,
    wanted: dict[int, tuple[BlockNode, NodeOptions, bool]],
) -> None:
    """Work out what *node*, and what is below it, is to become; those that change go into *wanted*, parents first."""
    below: dict[str, dict[str, Any]] = {name: {} for name in node.children}
    own: dict[str, Any] = {}
    for name, value in given.items():
        child = next((known for known in below if name.startswith(known + ".")), None)
        if child is not None:
            below[child][name[len(child) + 1 :]] = value
        elif name in node.children or name in _REFERENCES:
            _check_reference(node, name, value)
        else:
            own[name] = value
    if parent is not None:
        for name, field in _INHERITED.items():
            old, new = (getattr(options, field) for options in parent)
            if getattr(node.options, field) == old != new:
                own.setdefault(name, new)
    read_only = own.pop("read-only", None)
    if read_only is not None:
        writable = not parse(NodeOptions, {"read-only": read_only}, driver=node.driver).read_only
    writes = node.writable if writable is None else writable
    options = _merged(node, own)
    if writes and options.force_share:
        raise InvalidArgument("force-share=on can only be used with read-only images")
    if options != node.options or writes != node.writable:
        wanted[id(node)] = node, options, writes
    for name, child_given in below.items():
        edge = node.children[name]
        follows = edge.role is not Role.BACKING and edge.node.writable == node.writable
        _collect(edge.node, child_given, writes if follows else None, (node.options, options), wanted)


def _check_reference(node: BlockNode, name: str, value: Any) -> None:
    child = node.children.get(name)
    if child is None or value != child.node.name:
        shown = "null" if value is None else value
        raise InvalidArgument(
            f"Cannot find device='' nor node-name='{shown}'",
            hint="A reopen does not exchange nodes.",
            path=node.filename,
        )


def _merged(node: BlockNode, own: dict[str, Any]) -> NodeOptions:
    """Return *node*'s options with *own* in their place. Raises InvalidArgument for what cannot be changed, or is no value."""
    cls = type(node.options)
    known = declared(cls)
    fields = {found.field: name for name, found in known.items()}
    present = {fields[field]: value for field, value in vars(node.options).items()}
    for name, value in list(own.items()):
        changes = name in known and (name in node.changeable or name in declared(NodeOptions))
        if changes and name not in _UNCHANGEABLE:
            continue
        told = {"driver": node.driver, "node-name": node.name}.get(name, present.get(name))
        if told is None or str(value) != str(told):
            raise InvalidArgument(f"Cannot change the option '{name}'", path=node.filename)
        del own[name]
    new = parse(cls, own, driver=node.driver)
    changed = {fields[field]: value for field, value in vars(new).items()}
    joined = cls.join(changed, present)
    merged = cls(**{known[name].field: value for name, value in joined.items()})
    check_zero_detection(merged)
    return merged


def _check_users(wanted: dict[int, tuple[BlockNode, NodeOptions, bool]]) -> None:
    """Raise ReadOnly where a node is to be read only that somebody writes to who does not stop doing so."""

    def will_write(edge: Edge) -> bool:
        if isinstance(edge, Child):
            parent = edge.parent
            _, _, writes = wanted.get(id(parent), (parent, parent.options, parent.writable))
            return writes and edge.role is not Role.BACKING
        return isinstance(edge, UserEdge) and bool(edge.perm & (WRITE | RESIZE))

    for node, _, writes in wanted.values():
        if not writes and any(will_write(edge) for edge in node.parents):
            raise ReadOnly(
                f"Read-only block node '{node.name}' cannot support read-write users", errno=1, path=node.filename
            )

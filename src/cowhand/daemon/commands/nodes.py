"""Nodes: adding, removing, reopening, snapshots, what is told of them (QEMU ``qapi/block-core.json``)."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.graph.block_status import skip_filters
from cowhand.block.graph.blockers import check_blockers
from cowhand.block.graph.changes import GraphChange, users_of
from cowhand.block.graph.reopen import reopen
from cowhand.block.node.node import BlockNode, Role, walk
from cowhand.block.node.options import flatten, nest
from cowhand.block.opening.opening import Opening
from cowhand.core.errors import InvalidArgument
from cowhand.daemon.table import command
from cowhand.drivers import REGISTRY

if TYPE_CHECKING:
    from cowhand.daemon.daemon import Daemon


def find_node(daemon: Daemon, device: str | None = None, node_name: str | None = None) -> BlockNode:
    """Return the node that a command names. Raises InvalidArgument in QEMU's words."""
    name = node_name if node_name is not None else device
    found = daemon.names.find(name) if name is not None else None
    if found is None:
        raise InvalidArgument(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
    return found


@command("blockdev-add", None)
def blockdev_add(daemon: Daemon, description: dict[str, Any]) -> None:
    given = nest(description)
    if "driver" not in given:
        raise InvalidArgument("Parameter 'driver' is missing")
    if "node-name" not in given:
        raise InvalidArgument("'node-name' must be specified for the root node")
    if REGISTRY.find(str(given["driver"])) is None:
        raise InvalidArgument(f"Parameter 'driver' does not accept value '{given['driver']}'")
    node = Opening(REGISTRY, names=daemon.names).open(given)
    daemon.names.own(node)


@command("blockdev-del", {"node-name": "str"})
def blockdev_del(daemon: Daemon, node_name: str) -> None:
    node = daemon.names.find(node_name)
    if node is None:
        raise InvalidArgument(f"Failed to find node with node-name='{node_name}'")
    daemon.names.disown(node)


@command("blockdev-reopen", {"options": ["any"]})
def blockdev_reopen(daemon: Daemon, options: list[dict[str, Any]]) -> None:
    if not options:
        raise InvalidArgument("Parameter 'options' is empty: there is nothing to reopen")
    with ExitStack() as stack:
        wanted: list[tuple[BlockNode, dict[str, Any]]] = []
        for number, given in enumerate(options):
            if not isinstance(given, dict):
                raise InvalidArgument(f"Invalid parameter type for 'options[{number}]', expected: object")
            if "node-name" not in given:
                raise InvalidArgument("node-name not specified")
            wanted.append((find_node(daemon, node_name=str(given["node-name"])), nest(given)))
        stack.enter_context(graph.quiesce(*(node for node, _ in wanted)))
        change = GraphChange()
        plain: list[tuple[BlockNode, dict[str, Any]]] = []
        for node, given in wanted:
            plain.append((node, _exchange(daemon, change, node, given)))
        change.commit()
        for node, given in plain:
            with Disk(node, name="reopen") as disk:
                reopen(disk, flatten(given), node=node)


def _exchange(daemon: Daemon, change: GraphChange, node: BlockNode, given: dict[str, Any]) -> dict[str, Any]:
    """Put into *change* the children that *given* exchanges; return what is left of the options."""
    left: dict[str, Any] = {}
    if node.backing is not None and "backing" not in given and node.supports_backing:
        raise InvalidArgument(f"backing is missing for '{node.name}'")
    for name, value in given.items():
        child = node.children.get(name)
        if child is None and name != "backing":
            left[name] = value
        elif value is None and name == "backing":
            if child is not None:
                change.detach(child)
        elif isinstance(value, str):
            other = find_node(daemon, device="", node_name=value)
            if child is None:
                change.attach(node, name, other, Role.BACKING)
            elif child.node is not other:
                change.move(child, other)
        else:
            raise InvalidArgument(f"Cannot change the option '{name}.driver'")
    return left


@command("block_resize", {"*device": "str", "*node-name": "str", "size": "int"})
def block_resize(daemon: Daemon, size: int, device: str | None = None, node_name: str | None = None) -> None:
    if size < 0:
        raise InvalidArgument("Parameter 'size' expects a >0 size")
    node = find_node(daemon, device, node_name)
    check_blockers(node, "resize")
    with Disk(node, writable=True, name="resize") as disk:
        disk.resize(-(-size // 512) * 512, shrink=True)


@command("blockdev-snapshot", {"node": "str", "overlay": "str"})
def blockdev_snapshot(daemon: Daemon, node: str, overlay: str) -> None:
    take_snapshot(find_node(daemon, node, node), find_node(daemon, overlay, overlay))


def take_snapshot(node: BlockNode, overlay: BlockNode) -> None:
    """Have the users of *node* use *overlay*, which gets it as its backing node. Raises InvalidArgument in QEMU's words."""
    check_blockers(node, "external-snapshot")
    if users_of(overlay):
        raise InvalidArgument("The overlay is already in use")
    if overlay.backing is not None:
        raise InvalidArgument("The overlay already has a backing image")
    if not overlay.supports_backing:
        raise InvalidArgument("The overlay does not support backing images")
    with graph.quiesce(node, overlay):
        if node.writable:
            node.settle()
        change = GraphChange()
        for edge in users_of(node):
            change.move(edge, overlay)
        change.attach(overlay, "backing", node, Role.BACKING)
        change.commit()


_SNAPSHOT = {
    "*device": "str", "*node-name": "str", "snapshot-file": "str", "*snapshot-node-name": "str", "*format": "str",
    "*mode": "NewImageMode",
}  # fmt: skip


@command("blockdev-snapshot-sync", _SNAPSHOT)
def blockdev_snapshot_sync(
    daemon: Daemon,
    snapshot_file: str,
    device: str | None = None,
    node_name: str | None = None,
    snapshot_node_name: str | None = None,
    format: str = "qcow2",
    mode: str = "absolute-paths",
) -> None:
    from cowhand.image.create import create

    node = find_node(daemon, device, node_name)
    if snapshot_node_name is not None and snapshot_node_name in daemon.names:
        raise InvalidArgument("New overlay node-name already in use")
    if mode == "absolute-paths":
        below = skip_filters(node)
        create(
            snapshot_file, format, node.size, backing=os.path.abspath(below.filename), backing_format=below.driver,
            overwrite=True, force=True,
        )  # fmt: skip
    description: dict[str, Any] = {
        "driver": format,
        "file": {"driver": "file", "filename": snapshot_file},
        "backing": None,
        "read-only": not node.writable,
    }
    if snapshot_node_name is not None:
        description["node-name"] = snapshot_node_name
    overlay = Opening(REGISTRY, names=daemon.names).open(description)
    keeper = Disk(overlay, name="snapshot")
    try:
        take_snapshot_under(node, overlay, keeper)
    finally:
        keeper.close()


def take_snapshot_under(node: BlockNode, overlay: BlockNode, keeper: Disk) -> None:
    """The same as :func:`take_snapshot` for an overlay that *keeper* holds meanwhile."""
    check_blockers(node, "external-snapshot")
    with graph.quiesce(node, overlay):
        if node.writable:
            node.settle()
        change = GraphChange()
        for edge in users_of(node):
            change.move(edge, overlay)
        change.attach(overlay, "backing", node, Role.BACKING)
        change.commit()


@command("change-backing-file", {"device": "str", "image-node-name": "str", "backing-file": "str"})
def change_backing_file(daemon: Daemon, device: str, image_node_name: str, backing_file: str) -> None:
    root = find_node(daemon, device, device)
    image = find_node(daemon, "", image_node_name)
    if not any(node is image for node in walk((root,))):
        raise InvalidArgument("'device' and image file are not in the same chain")
    below = image.backing
    if below is None:
        raise InvalidArgument("not allowing backing file change on an image without a backing file")
    from cowhand.jobs.live.layers import writable_meanwhile

    with writable_meanwhile(image):
        image.change_backing(backing_file, skip_filters(below.node).driver)


# -- what is told


def node_info(node: BlockNode) -> dict[str, Any]:
    """Return BlockDeviceInfo of *node*."""
    depth, layer = 0, skip_filters(node)
    while layer.backing is not None:
        layer, depth = skip_filters(layer.backing.node), depth + 1
    options = node.options
    info: dict[str, Any] = {
        "file": node.filename,
        "node-name": node.name,
        "ro": not node.writable,
        "drv": node.driver,
        "encrypted": bool(getattr(node, "encryption", None)),
        "detect_zeroes": options.detect_zeroes,
        "backing_file_depth": depth,
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "cache": {"writeback": True, "direct": options.cache_direct, "no-flush": options.cache_no_flush},
        "write_threshold": 0,
        "image": {
            "filename": node.filename,
            "format": node.driver,
            "virtual-size": node.size,
            "dirty-flag": False,
        },
    }  # fmt: skip
    if (used := node.allocated_size()) is not None:
        info["image"]["actual-size"] = used
    if node.backing is not None:
        info["backing_file"] = skip_filters(node.backing.node).filename
    if node.dirty_bitmaps:
        info["dirty-bitmaps"] = [bitmap.info() for bitmap in reversed(list(node.dirty_bitmaps))]
    return info


@command("query-named-block-nodes", {"*flat": "bool"})
def query_named_block_nodes(daemon: Daemon, flat: bool = False) -> list[dict[str, Any]]:
    return [node_info(node) for node in reversed(list(daemon.names))]


@command("query-block", {})
def query_block(daemon: Daemon) -> list[dict[str, Any]]:
    return []  # the daemon has no devices


@command("query-blockstats", {"*query-nodes": "bool"})
def query_blockstats(daemon: Daemon, query_nodes: bool = False) -> list[dict[str, Any]]:
    return [{"node-name": node.name, "stats": {}} for node in reversed(list(daemon.names))] if query_nodes else []


@command("x-debug-query-block-graph", {})
def query_block_graph(daemon: Daemon) -> dict[str, Any]:
    from cowhand.block.node.node import PERMISSION_NAMES

    numbers: dict[int, int] = {}
    nodes, edges = [], []

    def number(thing: object) -> int:
        return numbers.setdefault(id(thing), len(numbers) + 1)

    for node in daemon.names:
        nodes.append({"id": number(node), "type": "block-driver", "name": node.name})
    for node in daemon.names:
        for edge in node.parents:
            user = edge.owner
            if edge.is_child:
                owner = number(user)
            else:
                owner = number(edge)
                name = user if isinstance(user, str) else user.name
                nodes.append({"id": owner, "type": "block-backend", "name": name})
            words = [text.replace(" ", "-") for bit, text in PERMISSION_NAMES.items()]
            edges.append(
                {
                    "parent": owner,
                    "child": number(node),
                    "name": edge.name,
                    "perm": [word for bit, word in zip(PERMISSION_NAMES, words, strict=True) if edge.perm & bit],
                    "shared-perm": [
                        word for bit, word in zip(PERMISSION_NAMES, words, strict=True) if edge.shared & bit
                    ],
                }
            )
    return {"nodes": nodes, "edges": edges}

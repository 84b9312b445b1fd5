"""Dirty bitmaps (QEMU ``qapi/block-core.json``: ``block-dirty-bitmap-*``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.bitmaps.named import DirtyBitmap
from cowhand.block.disk import Disk
from cowhand.core.errors import InvalidArgument
from cowhand.daemon.commands.nodes import find_node
from cowhand.daemon.table import command
from cowhand.image import bitmaps

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.daemon.daemon import Daemon


def disk_of(node: BlockNode, *, writable: bool = False) -> Disk:
    """Return a disk over *node* for the length of one command."""
    return Disk(node, writable=writable, resizable=False, name="bitmap")


_ADD = {"node": "str", "name": "str", "*granularity": "int", "*persistent": "bool", "*disabled": "bool"}


@command("block-dirty-bitmap-add", _ADD)
def add(
    daemon: Daemon,
    node: str,
    name: str,
    granularity: int | None = None,
    persistent: bool = False,
    disabled: bool = False,
) -> None:
    with disk_of(find_node(daemon, node, node), writable=persistent) as disk:
        bitmaps.add_bitmap(disk, name, granularity=granularity, persistent=persistent, enabled=not disabled)


@command("block-dirty-bitmap-remove", {"node": "str", "name": "str"})
def remove(daemon: Daemon, node: str, name: str) -> None:
    with disk_of(find_node(daemon, node, node)) as disk:
        bitmaps.remove_bitmap(disk, name)


@command("block-dirty-bitmap-clear", {"node": "str", "name": "str"})
def clear(daemon: Daemon, node: str, name: str) -> None:
    with disk_of(find_node(daemon, node, node)) as disk:
        bitmaps.clear_bitmap(disk, name)


@command("block-dirty-bitmap-enable", {"node": "str", "name": "str"})
def enable(daemon: Daemon, node: str, name: str) -> None:
    with disk_of(find_node(daemon, node, node)) as disk:
        bitmaps.enable_bitmap(disk, name)


@command("block-dirty-bitmap-disable", {"node": "str", "name": "str"})
def disable(daemon: Daemon, node: str, name: str) -> None:
    with disk_of(find_node(daemon, node, node)) as disk:
        bitmaps.enable_bitmap(disk, name, enabled=False)


def sources_of(daemon: Daemon, node: str, given: list[Any]) -> list[DirtyBitmap]:
    """Return the bitmaps that a merge names: names of bitmaps of *node*, or {"node", "name"}. Raises InvalidArgument."""
    if not given:
        raise InvalidArgument("Parameter 'bitmaps' is empty: there is nothing to merge")
    found = []
    for number, item in enumerate(given):
        if isinstance(item, dict) and set(item) == {"node", "name"}:
            holder, name = str(item["node"]), str(item["name"])
        elif isinstance(item, str):
            holder, name = node, item
        else:
            raise InvalidArgument(f"Invalid parameter type for 'bitmaps[{number}]', expected: object")
        with disk_of(find_node(daemon, holder, holder)) as disk:
            found.append(bitmaps.find_bitmap(disk, name))
    return found


@command("block-dirty-bitmap-merge", {"node": "str", "target": "str", "bitmaps": ["any"]})
def merge(daemon: Daemon, node: str, target: str, **given: list[Any]) -> None:
    sources = sources_of(daemon, node, given["bitmaps"])
    with disk_of(find_node(daemon, node, node)) as disk:
        for source in sources:
            bitmaps.merge_bitmap(disk, target, source)


@command("x-debug-block-dirty-bitmap-sha256", {"node": "str", "name": "str"})
def sha256(daemon: Daemon, node: str, name: str) -> dict[str, str]:
    with disk_of(find_node(daemon, node, node)) as disk:
        return {"sha256": bitmaps.find_bitmap(disk, name).bits.sha256()}

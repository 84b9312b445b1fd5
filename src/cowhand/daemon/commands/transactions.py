"""``transaction``: actions that are prepared in order; the first error undoes all, the last first (QEMU ``qapi/transaction.json``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cowhand.block.graph import graph
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.daemon.commands import bitmaps as bitmap_commands
from cowhand.daemon.commands.block_jobs import forget, make_backup
from cowhand.daemon.commands.nodes import find_node, take_snapshot
from cowhand.daemon.table import COMMANDS, command
from cowhand.daemon.types import check_arguments
from cowhand.image import bitmaps
from cowhand.jobs.job import Transaction

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.daemon.daemon import Daemon

#: Undoes a prepared action; and finishes it when all were prepared.
Prepared = tuple[Callable[[], None], Callable[[], None]]


def _nothing() -> None:
    return


class _Action:
    """What an action needs to be prepared: the daemon, its arguments, the transaction of its jobs."""

    def __init__(self, daemon: Daemon, data: dict[str, Any], group: Transaction | None) -> None:
        self.daemon = daemon
        self.data = data
        self.group = group


def _bitmap_add(action: _Action) -> Prepared:
    bitmap_commands.add(action.daemon, **action.data)
    return lambda: bitmap_commands.remove(action.daemon, action.data["node"], action.data["name"]), _nothing


def _bitmap_clear(action: _Action) -> Prepared:
    node = find_node(action.daemon, action.data["node"], action.data["node"])
    with bitmap_commands.disk_of(node) as disk:
        bitmap = bitmaps.find_bitmap(disk, action.data["name"])
        bitmap.check()
        kept = bitmap.bits.copy()
        bitmaps.clear_bitmap(disk, action.data["name"])
    return lambda: bitmap.bits.merge(kept), _nothing


def _bitmap_switch(action: _Action, enabled: bool) -> Prepared:
    node = find_node(action.daemon, action.data["node"], action.data["node"])
    with bitmap_commands.disk_of(node) as disk:
        before = bitmaps.find_bitmap(disk, action.data["name"]).enabled
        bitmaps.enable_bitmap(disk, action.data["name"], enabled=enabled)

    def undo() -> None:
        with bitmap_commands.disk_of(node) as disk:
            bitmaps.enable_bitmap(disk, action.data["name"], enabled=before)

    return undo, _nothing


def _bitmap_merge(action: _Action) -> Prepared:
    data = action.data
    node = find_node(action.daemon, data["node"], data["node"])
    sources = bitmap_commands.sources_of(action.daemon, data["node"], data["bitmaps"])
    with bitmap_commands.disk_of(node) as disk:
        target = bitmaps.find_bitmap(disk, data["target"])
        target.check()
        kept = target.bits.copy()
        for source in sources:
            bitmaps.merge_bitmap(disk, data["target"], source)
    return lambda: target.replace(kept), _nothing


def _bitmap_remove(action: _Action) -> Prepared:
    data = action.data
    node = find_node(action.daemon, data["node"], data["node"])
    with bitmap_commands.disk_of(node) as disk:
        bitmaps.find_bitmap(disk, data["name"]).check(inconsistent=True)
    return _nothing, lambda: bitmap_commands.remove(action.daemon, data["node"], data["name"])


def _backup(action: _Action) -> Prepared:
    job = make_backup(action.daemon, transaction=action.group, **action.data)
    job.check()
    action.daemon.add_job(job)
    try:
        job.install()
    except CowhandError:
        forget(job)
        raise

    def undo() -> None:
        job.uninstall()
        forget(job)

    return undo, lambda: job.start(drained=True)


def _snapshot(action: _Action) -> Prepared:
    daemon, data = action.daemon, action.data
    node, overlay = find_node(daemon, data["node"], data["node"]), find_node(daemon, data["overlay"], data["overlay"])
    take_snapshot(node, overlay)

    def undo() -> None:
        from cowhand.block.graph.changes import GraphChange, users_of

        with graph.quiesce(node, overlay):
            change = GraphChange()
            for edge in users_of(overlay):
                change.move(edge, node)
            change.detach(overlay.children["backing"])
            change.commit()

    return undo, _nothing


def _abort(action: _Action) -> Prepared:
    raise InvalidArgument("Transaction aborted using Abort action")


#: {action: how it is prepared}; their arguments are those of the commands of the same names
ACTIONS: dict[str, Callable[[_Action], Prepared]] = {
    "block-dirty-bitmap-add": _bitmap_add,
    "block-dirty-bitmap-remove": _bitmap_remove,
    "block-dirty-bitmap-clear": _bitmap_clear,
    "block-dirty-bitmap-enable": lambda action: _bitmap_switch(action, True),
    "block-dirty-bitmap-disable": lambda action: _bitmap_switch(action, False),
    "block-dirty-bitmap-merge": _bitmap_merge,
    "blockdev-backup": _backup,
    "blockdev-snapshot": _snapshot,
    "abort": _abort,
}
_JOBS = frozenset(("blockdev-backup",))


@command("transaction", {"actions": ["TransactionAction"], "*properties": "TransactionProperties"})
def transaction(daemon: Daemon, actions: list[dict[str, Any]], properties: dict[str, Any] | None = None) -> None:
    grouped = (properties or {}).get("completion_mode") == "grouped"
    group = Transaction() if grouped else None
    checked: list[tuple[str, _Action]] = []
    for number, item in enumerate(actions):
        kind, data = item["type"], item["data"]
        if kind not in ACTIONS:
            raise InvalidArgument(f"Parameter 'type' does not accept value '{kind}'")
        if not isinstance(data, dict):
            raise InvalidArgument(f"Invalid parameter type for 'actions[{number}].data', expected: object")
        spec = COMMANDS[kind].spec if kind != "abort" else {}
        arguments = check_arguments(spec or {}, data, f"actions[{number}].data.")
        checked.append((kind, _Action(daemon, arguments, group)))
        if grouped and kind not in _JOBS:
            raise InvalidArgument(f"Action '{kind}' does not support Transaction property completion-mode = grouped")
    with graph.quiesce(*_nodes_of(daemon, actions)):
        undo: list[Callable[[], None]] = []
        finish: list[Callable[[], None]] = []
        try:
            for kind, action in checked:
                back, forward = ACTIONS[kind](action)
                undo.append(back)
                finish.append(forward)
        except BaseException:
            for back in reversed(undo):
                back()
            raise
        for forward in finish:
            forward()


def _nodes_of(daemon: Daemon, actions: list[dict[str, Any]]) -> list[BlockNode]:
    """Return the nodes that *actions* name, which are drained together: all of them see one moment."""
    found = []
    for item in actions:
        for name in ("node", "device", "target", "overlay"):
            value = item["data"].get(name)
            node = daemon.names.find(value) if isinstance(value, str) else None
            if node is not None:
                found.append(node)
    return found

"""Exports and the NBD server (QEMU ``qapi/block-export.json``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.core.errors import InvalidArgument
from cowhand.daemon.commands.nodes import find_node
from cowhand.daemon.table import command
from cowhand.daemon.types import STRUCTS, Spec, check_arguments

if TYPE_CHECKING:
    from cowhand.daemon.daemon import Daemon

_SERVER = {"addr": "SocketAddressLegacy", "*tls-creds": "str", "*tls-authz": "str", "*max-connections": "int"}


@command("nbd-server-start", _SERVER)
def nbd_server_start(
    daemon: Daemon,
    addr: dict[str, Any],
    tls_creds: str | None = None,
    tls_authz: str | None = None,
    max_connections: int | None = None,
) -> None:
    if not isinstance(addr["data"], dict):
        raise InvalidArgument("Invalid parameter type for 'addr.data', expected: object")
    plain = check_arguments(STRUCTS["SocketAddress"], {"type": addr["type"], **addr["data"]}, "addr.data.")
    start_server(daemon, plain, tls_creds, tls_authz, max_connections)


def start_server(
    daemon: Daemon,
    address: dict[str, Any],
    tls_creds: str | None = None,
    tls_authz: str | None = None,
    max_connections: int | None = None,
) -> None:
    """Start the NBD server. Raises InvalidArgument for what is not there."""
    if tls_authz is not None and tls_creds is None:
        raise InvalidArgument("--tls-authz is not permitted without --tls-creds")
    if tls_creds is not None:
        raise InvalidArgument(f"No TLS credentials with id '{tls_creds}'")
    daemon.exports.start_server(address, max_connections)


@command("nbd-server-stop", {})
def nbd_server_stop(daemon: Daemon) -> None:
    daemon.exports.stop_server()


_ADD = {"device": "str", "*name": "str", "*description": "str", "*writable": "bool", "*bitmap": "str"}


@command("nbd-server-add", _ADD)
def nbd_server_add(
    daemon: Daemon,
    device: str,
    name: str | None = None,
    description: str = "",
    writable: bool = False,
    bitmap: str | None = None,
) -> None:
    node = find_node(daemon, device, device)
    ident = name if name is not None else device
    daemon.exports.add_nbd(
        ident, node, name=ident, description=description, writable=writable and node.writable,
        bitmaps=[bitmap] if bitmap is not None else None,
    )  # fmt: skip


@command("nbd-server-remove", {"name": "str", "*mode": "BlockExportRemoveMode"})
def nbd_server_remove(daemon: Daemon, name: str, mode: str = "safe") -> None:
    ident = daemon.exports.find_by_name(name)
    if ident is None:
        raise InvalidArgument(f"Export '{name}' is not found")
    daemon.exports.remove(ident, mode)


_EXPORT: Spec = {
    "type": "BlockExportType", "id": "str", "node-name": "str", "*writable": "bool", "*writethrough": "bool",
    "*iothread": "str", "*fixed-iothread": "bool", "*name": "str", "*description": "str", "*bitmaps": ["any"],
    "*allocation-depth": "bool", "*mountpoint": "str", "*growable": "bool", "*allow-other": "any", "*addr": "any",
    "*logical-block-size": "int", "*num-queues": "int",
}  # fmt: skip


@command("block-export-add", _EXPORT)
def block_export_add(daemon: Daemon, **given: Any) -> None:
    if given["type"] != "nbd":
        raise InvalidArgument(f"exports of type '{given['type']}' are not there yet", hint="Export by nbd.")
    node = find_node(daemon, "", given["node_name"])
    bitmaps = [item["name"] if isinstance(item, dict) else str(item) for item in given.get("bitmaps", [])]
    daemon.exports.add_nbd(
        given["id"], node, name=given.get("name"), description=given.get("description", ""),
        writable=given.get("writable", False), bitmaps=bitmaps, allocation_depth=given.get("allocation_depth", False),
        writethrough=given.get("writethrough", False),
    )  # fmt: skip


@command("block-export-del", {"id": "str", "*mode": "BlockExportRemoveMode"})
def block_export_del(daemon: Daemon, id: str, mode: str = "safe") -> None:
    daemon.exports.remove(id, mode)


@command("query-block-exports", {})
def query_block_exports(daemon: Daemon) -> list[dict[str, Any]]:
    return daemon.exports.info()

"""Exports by id, and the NBD server of the daemon (QEMU ``qapi/block-export.json``)."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from cowhand.block.disk import Disk
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.exports.nbd import sockets
from cowhand.exports.nbd.export import NbdExport
from cowhand.exports.nbd.limits import Limits
from cowhand.exports.nbd.server import NbdServer

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.daemon.daemon import Daemon

_ID = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*\Z")


class ExportTable:
    """The exports of one daemon; its methods are called with the daemon's control lock."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._server: NbdServer | None = None
        self._unix_path: str | None = None
        self._exports: dict[str, tuple[str, NbdExport, Disk]] = {}

    # -- the server

    def start_server(self, address: dict[str, Any], max_connections: int | None) -> None:
        """Listen for NBD clients. Raises InvalidArgument where it runs already, IOFailed where it cannot."""
        if self._server is not None:
            raise InvalidArgument("NBD server already running")
        kind = address["type"]
        if kind == "unix":
            path = _needed(address, "path")
            listening = [sockets.listen_unix(path)]
            self._unix_path = path
        elif kind == "inet":
            listening = sockets.listen_tcp(_needed(address, "host"), _needed(address, "port"))
        elif kind == "vsock":
            listening = [sockets.listen_vsock(int(_needed(address, "port")), int(_needed(address, "cid")))]
        else:
            raise InvalidArgument("an NBD server listens on a path, a host and port, or a vsock port")
        server = NbdServer(limits=Limits(clients=max_connections or None))
        server.listen(*listening)
        server.start()
        self._server = server

    def stop_server(self) -> None:
        """End the server and all its exports. Raises InvalidArgument where none runs."""
        server = self._running()
        self._server = None
        server.stop()
        for ident in list(self._exports):
            self._forget(ident)
        if self._unix_path is not None:
            import contextlib
            import os

            with contextlib.suppress(OSError):
                os.unlink(self._unix_path)
            self._unix_path = None

    def _running(self) -> NbdServer:
        if self._server is None:
            raise InvalidArgument("NBD server not running")
        return self._server

    # -- exports

    def add_nbd(
        self,
        ident: str,
        node: BlockNode,
        *,
        name: str | None = None,
        description: str = "",
        writable: bool = False,
        bitmaps: list[str] | None = None,
        allocation_depth: bool = False,
        writethrough: bool = False,
    ) -> None:
        """Export *node* by NBD. Raises InvalidArgument in QEMU's words."""
        if not _ID.match(ident):
            raise InvalidArgument("Invalid block export id")
        if ident in self._exports:
            raise InvalidArgument(f"Block export id '{ident}' is already in use")
        if writable and not node.writable:
            raise InvalidArgument("Cannot export read-only node as writable")
        server = self._running()
        export_name = node.name if name is None else name
        if server.exports.find(export_name) is not None and export_name in (found.name for found in server.exports):
            raise InvalidArgument(f"NBD server already has export named '{export_name}'")
        disk = Disk(node, writable=writable, resizable=False, write_through=writethrough, name=ident)
        try:
            export = NbdExport(
                disk, export_name, description=description, writable=writable, allocation_depth=allocation_depth,
                bitmaps=bitmaps or (),
            )  # fmt: skip
            server.exports.add(export)
        except CowhandError:
            disk.close()
            raise
        self._exports[ident] = ("nbd", export, disk)

    def remove(self, ident: str, mode: str = "safe") -> None:
        """Delete an export; *mode* "safe" refuses while it has clients, "hard" ends them. Raises InvalidArgument."""
        if ident not in self._exports:
            raise InvalidArgument(f"Export '{ident}' is not found")
        _, export, _ = self._exports[ident]
        server = self._running()
        users = [connection for connection in server.connections if connection.export is export]
        if users and mode == "safe":
            # A client that has just hung up is still being put away.
            for _ in range(50):
                time.sleep(0.01)
                users = [connection for connection in server.connections if connection.export is export]
                if not users:
                    break
        if users and mode == "safe":
            raise InvalidArgument(f"export '{ident}' still in use", hint="Use mode='hard' to force client disconnect")
        server.exports.remove(export.name)
        for connection in users:
            connection.abort()
        self._forget(ident)

    def _forget(self, ident: str) -> None:
        _, _, disk = self._exports.pop(ident)
        disk.close()
        self._daemon.event("BLOCK_EXPORT_DELETED", id=ident)

    def find_by_name(self, name: str) -> str | None:
        """Return the id of the export that clients know as *name*."""
        return next((ident for ident, (_, export, _) in self._exports.items() if export.name == name), None)

    def info(self) -> list[dict[str, Any]]:
        """Return BlockExportInfo of each, the newest first."""
        return [
            {"id": ident, "type": kind, "node-name": disk.root.name, "shutting-down": False}
            for ident, (kind, _, disk) in reversed(self._exports.items())
        ]

    def close(self) -> None:
        """End everything."""
        if self._server is not None:
            self.stop_server()


def _needed(address: dict[str, Any], name: str) -> str:
    if name not in address:
        raise InvalidArgument(f"Parameter 'addr.{name}' is missing")
    return str(address[name])

"""What every QMP server answers (QEMU ``qapi/control.json``, ``qapi/introspect.json``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.daemon.daemon import VERSION
from cowhand.daemon.table import command, load, schema

if TYPE_CHECKING:
    from cowhand.daemon.daemon import Daemon


@command("query-version", {})
def query_version(daemon: Daemon) -> dict[str, Any]:
    return VERSION


@command("query-commands", {})
def query_commands(daemon: Daemon) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted([*load(), "qmp_capabilities"])]


@command("query-qmp-schema", {})
def query_qmp_schema(daemon: Daemon) -> list[dict[str, Any]]:
    return schema()


@command("quit", {})
def quit_daemon(daemon: Daemon) -> None:
    daemon.quit()

"""Objects: secrets, throttle groups, and I/O threads, which are accepted and mean nothing (QEMU ``qapi/qom.json``)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cowhand.core.errors import InvalidArgument
from cowhand.daemon.table import command

if TYPE_CHECKING:
    from cowhand.daemon.daemon import Daemon

_ID = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*\Z")
_IGNORED = ("iothread",)
TYPES = ("secret", "throttle-group", *_IGNORED)


@command("object-add", None)
def object_add(daemon: Daemon, given: dict[str, Any]) -> None:
    for name in ("qom-type", "id"):
        if name not in given:
            raise InvalidArgument(f"Parameter '{name}' is missing")
        if not isinstance(given[name], str):
            raise InvalidArgument(f"Invalid parameter type for '{name}', expected: string")
    properties = dict(given)
    kind, ident = properties.pop("qom-type"), properties.pop("id")
    if kind not in TYPES:
        raise InvalidArgument(f"Parameter 'qom-type' does not accept value '{kind}'")
    if not _ID.match(ident):
        raise InvalidArgument("Parameter 'id' expects an identifier")
    if ident in daemon.objects:
        raise InvalidArgument(f"attempt to add duplicate property '{ident}' to object (type 'container')")
    if kind == "secret":
        from cowhand.crypto import secrets

        secrets.add(ident, secrets.load(properties))
    elif kind == "throttle-group":
        from cowhand.block.filters.throttle import groups
        from cowhand.block.filters.throttle.limits import Limits

        limits = properties.get("limits", {})
        if not isinstance(limits, dict):
            raise InvalidArgument("Invalid parameter type for 'limits', expected: object")
        groups.define(ident, Limits.parse(limits))
    daemon.objects[ident] = {"qom-type": kind, **properties}


@command("object-del", {"id": "str"})
def object_del(daemon: Daemon, id: str) -> None:
    found = daemon.objects.get(id)
    if found is None:
        raise InvalidArgument(f"object '{id}' not found")
    if found["qom-type"] == "secret":
        from cowhand.crypto import secrets

        secrets.remove(id)
    elif found["qom-type"] == "throttle-group":
        from cowhand.block.filters.throttle import groups

        groups.remove(id)
    del daemon.objects[id]

"""The table of commands: a typed function each, its arguments checked before it is called; the schema is made from it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.daemon.types import ENUMS, STRUCTS, Spec, Type, check_arguments

if TYPE_CHECKING:
    from cowhand.daemon.daemon import Daemon


class Command(NamedTuple):
    """One command: its function takes the daemon, and the arguments by Python's names; without a *spec* all of them as a dictionary."""

    name: str
    spec: Spec | None
    function: Callable[..., Any]

    def call(self, daemon: Daemon, given: Mapping[str, Any]) -> Any:
        """Check *given* and do the command. Raises CowhandError."""
        if self.spec is None:
            return self.function(daemon, dict(given))
        return self.function(daemon, **check_arguments(self.spec, given))


COMMANDS: dict[str, Command] = {}
_MODULES = ("basics", "nodes", "bitmaps", "block_jobs", "job_verbs", "exports", "objects", "transactions")


def command(name: str, spec: Spec | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function that follows as the command *name*."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        COMMANDS[name] = Command(name, spec, function)
        return function

    return register


def load() -> dict[str, Command]:
    """Return the table, with all modules of commands imported."""
    for module in _MODULES:
        importlib.import_module(f"cowhand.daemon.commands.{module}")
    return COMMANDS


#: {event: members}
EVENTS: dict[str, Spec] = {
    "JOB_STATUS_CHANGE": {"id": "str", "status": "str"},
    "BLOCK_JOB_READY": {"type": "str", "device": "str", "len": "int", "offset": "int", "speed": "int"},
    "BLOCK_JOB_COMPLETED": {
        "type": "str", "device": "str", "len": "int", "offset": "int", "speed": "int", "*error": "str",
    },
    "BLOCK_JOB_CANCELLED": {"type": "str", "device": "str", "len": "int", "offset": "int", "speed": "int"},
    "BLOCK_JOB_PENDING": {"type": "str", "id": "str"},
    "BLOCK_JOB_ERROR": {"device": "str", "operation": "str", "action": "str"},
    "BLOCK_EXPORT_DELETED": {"id": "str"},
    "BLOCK_WRITE_THRESHOLD": {"node-name": "str", "amount-exceeded": "size", "write-threshold": "size"},
}  # fmt: skip


def schema() -> list[dict[str, Any]]:
    """Return what query-qmp-schema answers: the commands and events of the table with their types, in QEMU's form of introspection."""
    out: list[dict[str, Any]] = []
    used: dict[str, dict[str, Any]] = {}

    def type_of(kind: Type) -> str:
        if isinstance(kind, list):
            name = f"[{type_of(kind[0])}]"
            used[name] = {"name": name, "meta-type": "array", "element-type": type_of(kind[0])}
            return name
        if kind == "any":
            used[kind] = {"name": "any", "meta-type": "any"}
        elif kind in ENUMS:
            values = list(ENUMS[kind])
            used[kind] = {"name": kind, "meta-type": "enum", "members": [{"name": v} for v in values], "values": values}
        elif kind in STRUCTS:
            if kind not in used:
                used[kind] = {}
                used[kind] = object_of(kind, STRUCTS[kind])
        else:
            json_type = {"str": "string", "bool": "boolean", "number": "number"}.get(kind, "int")
            used[kind] = {"name": kind, "meta-type": "builtin", "json-type": json_type}
        return kind

    def object_of(name: str, spec: Spec) -> dict[str, Any]:
        members = []
        for key, kind in spec.items():
            member: dict[str, Any] = {"name": key.removeprefix("*"), "type": type_of(kind)}
            if key.startswith("*"):
                member["default"] = None
            members.append(member)
        return {"name": name, "meta-type": "object", "members": members}

    for name, command in sorted(load().items()):
        arguments = f"q_obj_{name}-arg"
        used[arguments] = object_of(arguments, command.spec or {})
        out.append({"name": name, "meta-type": "command", "arg-type": arguments, "ret-type": type_of("any")})
    for name, spec in sorted(EVENTS.items()):
        arguments = f"q_obj_{name}-arg"
        used[arguments] = object_of(arguments, spec)
        out.append({"name": name, "meta-type": "event", "arg-type": arguments})
    return out + list(used.values())

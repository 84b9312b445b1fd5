"""The types of QMP's arguments, in QAPI's notation, and their checks, in QEMU's words (``docs/devel/qapi-code-gen``).

A specification is a dictionary {"name": type, "*optional": type}; a type is the name of a built-in one ("str", "int", "size", "bool",
"number", "any"), of an enumeration or structure of :data:`ENUMS` and :data:`STRUCTS`, or a list of one type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from cowhand.core.errors import InvalidArgument

Type: TypeAlias = "str | list[str]"
Spec: TypeAlias = "Mapping[str, Type]"

_BUILTIN: dict[str, tuple[type, str]] = {
    "str": (str, "string"),
    "int": (int, "integer"),
    "size": (int, "integer"),
    "bool": (bool, "boolean"),
    "number": (float, "number"),
}

ENUMS: dict[str, tuple[str, ...]] = {
    "BlockdevOnError": ("report", "ignore", "enospc", "stop", "auto"),
    "MirrorSyncMode": ("top", "full", "none", "incremental", "bitmap"),
    "BitmapSyncMode": ("on-success", "never", "always"),
    "MirrorCopyMode": ("background", "write-blocking"),
    "OnCbwError": ("break-guest-write", "break-snapshot"),
    "NewImageMode": ("existing", "absolute-paths"),
    "ActionCompletionMode": ("individual", "grouped"),
    "QMPCapability": ("oob",),
    "BlockExportType": ("nbd", "vhost-user-blk", "fuse", "vduse-blk"),
    "BlockExportRemoveMode": ("safe", "hard"),
    "SocketAddressType": ("inet", "unix", "vsock", "fd"),
}
STRUCTS: dict[str, Spec] = {
    "BlockDirtyBitmap": {"node": "str", "name": "str"},
    "SocketAddress": {
        "type": "SocketAddressType", "*path": "str", "*host": "str", "*port": "str", "*cid": "str", "*str": "str",
        "*ipv4": "bool", "*ipv6": "bool", "*to": "int", "*numeric": "bool", "*abstract": "bool", "*tight": "bool",
    },
    "SocketAddressLegacy": {"type": "SocketAddressType", "data": "any"},
    "TransactionProperties": {"*completion-mode": "ActionCompletionMode"},
    "TransactionAction": {"type": "str", "data": "any"},
}  # fmt: skip


def check_arguments(spec: Spec, given: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return *given* by Python's names, checked. Raises InvalidArgument naming the member by its *path*."""
    out: dict[str, Any] = {}
    known: set[str] = set()
    for key, kind in spec.items():
        name = key.removeprefix("*")
        known.add(name)
        if name not in given:
            if key == name:
                raise InvalidArgument(f"Parameter '{path}{name}' is missing")
            continue
        out[name.replace("-", "_")] = check(kind, given[name], path + name)
    for name in given:
        if name not in known:
            raise InvalidArgument(f"Parameter '{path}{name}' is unexpected")
    return out


def check(kind: Type, value: Any, path: str) -> Any:
    """Return *value* when it is a *kind*. Raises InvalidArgument."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise InvalidArgument(f"Invalid parameter type for '{path}', expected: array")
        return [check(kind[0], item, f"{path}[{number}]") for number, item in enumerate(value)]
    if kind == "any":
        return value
    if kind in _BUILTIN:
        return _check_builtin(kind, value, path)
    if kind in ENUMS:
        if not isinstance(value, str):
            raise InvalidArgument(f"Invalid parameter type for '{path}', expected: string")
        if value not in ENUMS[kind]:
            raise InvalidArgument(f"Parameter '{path}' does not accept value '{value}'")
        return value
    if not isinstance(value, dict):
        raise InvalidArgument(f"Invalid parameter type for '{path}', expected: object")
    return check_arguments(STRUCTS[kind], value, path + ".")


def _check_builtin(kind: str, value: Any, path: str) -> Any:
    wanted, word = _BUILTIN[kind]
    right = isinstance(value, wanted) and (kind == "bool" or not isinstance(value, bool))
    if kind == "number":
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right:
        raise InvalidArgument(f"Invalid parameter type for '{path}', expected: {word}")
    if wanted is int and not -(1 << 63) <= value < (1 << 64 if kind == "size" else 1 << 63):
        raise InvalidArgument(f"Invalid parameter type for '{path}', expected: {word}")
    if kind == "size" and value < 0:
        raise InvalidArgument(f"Invalid parameter type for '{path}', expected: {word}")
    return value

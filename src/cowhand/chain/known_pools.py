"""Folders that are known to hold images: those that the administrator or the user lists, and libvirt's storage pools.

``COWHAND_POOLS``, folders with colons between them, stands for all others where it is set, also when it is empty. Otherwise there are the lines of
``/etc/cowhand/pools`` and ``~/.config/cowhand/pools``, one folder each (``#`` begins a comment; ``-FOLDER`` says that nothing in FOLDER is an
image that matters), libvirt's default folders, and the target paths in ``/etc/libvirt/storage`` and ``~/.config/libvirt/storage``.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

VARIABLE = "COWHAND_POOLS"
_SYSTEM, _SYSTEM_LIBVIRT = "/etc/cowhand/pools", "/etc/libvirt/storage"
#: libvirt's default pool of the system, and of a user's session.
_DEFAULTS = ("/var/lib/libvirt/images", "~/.local/share/libvirt/images")
_MAX_CONFIG = 1 << 20
_MAX_POOLS = 1000
_TARGET = re.compile(r"<target>.*?<path>(.*?)</path>", re.DOTALL)


class Pools(NamedTuple):
    """Folders of known pools, and those that are left out."""

    folders: tuple[str, ...]
    left_out: tuple[str, ...]


def known_pools(environment: Mapping[str, str] | None = None) -> Pools:
    """Return the pools that are there. What of the lists cannot be read is taken for empty. Never raises."""
    environment = os.environ if environment is None else environment
    told = environment.get(VARIABLE)
    if told is not None:
        lines = told.split(os.pathsep)
    else:
        home = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        lines = _lines(_SYSTEM) + _lines(f"{home}/cowhand/pools")
        lines += [os.path.expanduser(name) for name in _DEFAULTS]
        lines += _libvirt(_SYSTEM_LIBVIRT) + _libvirt(f"{home}/libvirt/storage")
    kept = [line.strip() for line in lines]
    folders = [os.path.expanduser(line) for line in kept if line and not line.startswith(("#", "-"))]
    left_out = [os.path.realpath(os.path.expanduser(line[1:].strip())) for line in kept if line.startswith("-")]
    there = [folder for folder in dict.fromkeys(folders) if os.path.isabs(folder) and os.path.isdir(folder)]
    return Pools(tuple(there[:_MAX_POOLS]), tuple(left_out))


def _lines(path: str) -> list[str]:
    return _text(path).splitlines()


def _libvirt(folder: str) -> list[str]:
    """Return the target paths of the storage pools that are defined in *folder*."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".xml"))
    except OSError:
        return []
    found = []
    for name in names[:_MAX_POOLS]:
        found += [html.unescape(match[1]).strip() for match in _TARGET.finditer(_text(os.path.join(folder, name)))]
    return found


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(_MAX_CONFIG)
    except OSError:
        return ""

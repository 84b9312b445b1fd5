"""The registry of drivers: names, magic bytes and where the code is. Nothing is imported before it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

#: Bytes at the start of a file that probes may look at. QEMU reads 512; VHDX and dmg look further, by themselves.
PROBE_SIZE = 2048


class DriverEntry(NamedTuple):
    """One driver: ``kind`` is "protocol", "format" or "filter"; ``probe`` gives 0 to 100 for (first bytes, file name)."""

    name: str
    kind: str
    module: str
    attribute: str
    probe: Callable[[bytes, str], int] | None = None
    prefixes: tuple[str, ...] = ()  #: protocol prefixes of file names, without the colon
    creatable: bool = True
    links: str = (
        ""  #: module whose ``links(reader)`` says what an image names; "" for what stands on nothing (block/links)
    )

    def load(self) -> type[BlockNode]:
        """Import the driver and return its class."""
        node_class: type[BlockNode] = getattr(importlib.import_module(self.module), self.attribute)
        return node_class


class Registry:
    """A set of drivers. Filled once, at import, then only read: so thread-safe without a lock."""

    def __init__(self) -> None:
        self._entries: dict[str, DriverEntry] = {}
        self._outside_loaded = False

    def add(self, entry: DriverEntry) -> None:
        """Add a driver; the name must be new."""
        if entry.name in self._entries:
            raise InvalidArgument(f"driver '{entry.name}' is registered twice")
        self._entries[entry.name] = entry

    def __iter__(self) -> Iterator[DriverEntry]:
        return iter(self._entries.values())

    def find(self, name: str) -> DriverEntry | None:
        """Return the driver of that *name*, looking at installed packages when it is not built in; None when there is none."""
        entry = self._entries.get(name)
        if entry is None and not self._outside_loaded:
            self._load_outside()
            entry = self._entries.get(name)
        return entry

    def get(self, name: str) -> DriverEntry:
        """Return the driver of that *name*; raises InvalidArgument naming those that exist."""
        entry = self.find(name)
        if entry is None:
            known = ", ".join(sorted(self._entries))
            raise InvalidArgument(f"Unknown driver '{name}'", hint=f"Known drivers: {known}")
        return entry

    def by_prefix(self, prefix: str) -> DriverEntry | None:
        """Return the protocol driver that file names beginning with "*prefix*:" mean."""
        for entry in self._entries.values():
            if prefix in entry.prefixes:
                return entry
        return None

    def probe(self, data: bytes, filename: str) -> DriverEntry:
        """Return the format whose probe is surest of *data*, the first bytes of the file; raw when none is."""
        best, best_score = self._entries["raw"], 1
        for entry in self._entries.values():
            if entry.probe is not None:
                score = entry.probe(data, filename)
                if score > best_score:
                    best, best_score = entry, score
        return best

    def _load_outside(self) -> None:
        from importlib.metadata import entry_points

        self._outside_loaded = True
        for point in entry_points(group="cowhand.drivers"):
            entry: Any = point.load()
            if isinstance(entry, DriverEntry) and entry.name not in self._entries:
                self._entries[entry.name] = entry

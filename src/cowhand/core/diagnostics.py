"""Diagnostics: what a user should hear although no call failed. The library never prints; a tool installs a sink.

A message has the words that QEMU's tools use where they have some, since scripts compare them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

#: Called with (message, whether a tool puts its own name before it).
Sink: TypeAlias = Callable[[str, bool], None]

_sink: Sink | None = None


def set_sink(sink: Sink | None) -> None:
    """Send all further messages to *sink* (called from any thread; it must not raise), or drop them with None."""
    global _sink
    _sink = sink


def report(message: str, *, as_tool: bool = False) -> None:
    """Tell *message* to whoever listens. *as_tool*: QEMU's tools put their name before this one, and print the others as they are."""
    if _sink is not None:
        _sink(message, as_tool)

"""Diagnostics: what a user should hear although no call failed. The library never prints; a tool installs a sink.

A message has the words that QEMU's tools use where they have some, since scripts compare them.
"""

from __future__ import annotations

from collections.abc import Callable

_sink: Callable[[str], None] | None = None


def set_sink(sink: Callable[[str], None] | None) -> None:
    """Send all further messages to *sink* (called from any thread; it must not raise), or drop them with None."""
    global _sink
    _sink = sink


def report(message: str) -> None:
    """Tell *message* to whoever listens."""
    if _sink is not None:
        _sink(message)

"""What fuzzed text goes through: taken as an image's name, as options of one, as rules of blkdebug, and as a file whose format is asked for.

Only drivers that live in memory are there, so nothing that a name says reaches the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cowhand.block.disk import Disk
from cowhand.block.filters.blkdebug import config
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import UNTRUSTED
from cowhand.block.opening.registry import Registry
from cowhand.block.protocols.memory import MemoryNode
from cowhand.cli.compat import optionstrings
from cowhand.core.units import parse_size
from cowhand.drivers import REGISTRY
from tests.fuzz.exercise import Steps


class _InMemory(Registry):
    """The built-in drivers without those that reach files, devices or the network; none from installed packages."""

    def __init__(self) -> None:
        super().__init__()
        self._outside_loaded = True
        for entry in REGISTRY:
            if entry.kind != "protocol" or entry.name == "memory":
                self.add(entry)


_DRIVERS = _InMemory()


def exercise(data: bytes) -> dict[str, str]:
    """Take *data* for everything that users write as text; return what each step answered."""
    text = data.decode("utf-8", "surrogateescape")
    steps = Steps()
    steps.attempt("name", lambda: _open(text))
    steps.attempt("json", lambda: _open("json:" + text))
    steps.attempt("options", lambda: _options(text))
    steps.attempt("rules", lambda: _rules(text))
    steps.attempt("size", lambda: _size(text))
    steps.attempt("probe", lambda: _open({"file": MemoryNode(content=data)}))
    return steps.answers


def _open(description: str | Mapping[str, Any]) -> None:
    opening = Opening(_DRIVERS, UNTRUSTED, backing=False)
    try:
        root = opening.open(description, options={"read-only": True})
    except BaseException:
        opening.abandon()
        raise
    Disk(root).close()


def _options(text: str) -> None:
    _open({pair.name: pair.value for pair in optionstrings.parse(text, "file")})


def _rules(text: str) -> None:
    config.parse_text(text)


def _size(text: str) -> None:
    parse_size(text)

"""Work on full images goes by tables, not by clusters: no verb runs more lines of Python than a small part of the clusters that it looks at.

Lines are counted, not time: a table that is walked entry by entry shows at once, on any machine.
"""

from __future__ import annotations

import os
import sys
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import cowhand
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.formats.qcow2.ondisk.layout import L2_OFFSET_MASK
from cowhand.cli.main import main
from cowhand.image.create import create

SIZE = 4 << 30
CLUSTER = 64 << 10
CLUSTERS = SIZE // CLUSTER
FOLDER = os.path.dirname(cowhand.__file__)


class TooMuch(AssertionError):
    """More lines were run than allowed."""


class Lines:
    """Counts the lines that run in the library, in all threads; past *limit* they end by :class:`TooMuch`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    def of(self, work: Callable[[], object]) -> int:
        """Return how many lines *work* ran."""
        before = sys.gettrace()
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(before)
            threading.settrace(before)  # type: ignore[arg-type]
        return self.count

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(FOLDER) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self.count += 1
        if self.count > self.limit:
            raise TooMuch(f"{self.count} lines, in {frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line


def shuffle(path: Path) -> None:
    """Have every second cluster of the disk change places with the next, so that no run is longer than one."""
    with cowhand.open(path, writable=True) as disk:
        node: Any = disk.root
        words = array("Q", bytes(node.mapping.l1.data))
    words.byteswap()
    with path.open("r+b") as file:
        for entry in filter(None, words):
            file.seek(entry & L2_OFFSET_MASK)
            table = array("Q", file.read(CLUSTER))
            file.seek(entry & L2_OFFSET_MASK)
            file.write(swapped(table).tobytes())


def swapped(words: array[int]) -> array[int]:
    """Return *words* with neighbours exchanged."""
    result = array("Q", words)
    result[::2], result[1::2] = words[1::2], words[::2]
    return result


@pytest.fixture(scope="module", params=["in order", "shuffled", "extended"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("effort") / f"{request.param}.qcow2"
    extended = {"extended_l2": "on"} if request.param == "extended" else {}
    create(path, "qcow2", SIZE, {"preallocation": "metadata", **extended})
    if request.param == "shuffled":
        shuffle(path)
    return path


VERBS = [
    ("check",),
    ("map", "--extents"),
    ("measure", "-O", "qcow2"),
    ("du",),
    ("snapshot", "create"),
    ("snapshot", "delete"),
    ("compact", "--dry-run"),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_no_verb_takes_more_lines_than_its_kind_of_table_needs(
    image: Path, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table in order takes a few lines; one of which every cluster lies apart up to a few for each: those of comprehensions count too."""
    monkeypatch.setattr(Qcow2Node, "metadata_preallocated", False)  # or the file would be asked about each cluster
    words = [*verb, str(image), *(["s"] if verb[0] == "snapshot" else [])]
    count = Lines(100 * CLUSTERS).of(lambda: main(words))
    assert count < CLUSTERS * (60 if image.stem == "shuffled" else 4), (verb, count / CLUSTERS)

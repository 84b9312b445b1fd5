"""Small disks for the tests of the block layer, and threads whose errors reach the test."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2 import create as qcow2_create
from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode, Request
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.drivers import REGISTRY
from tests.tools.patience import PATIENCE as PATIENCE  # for the tests of this folder


def qcow2_file(size: int, **options: Any) -> MemoryNode:
    """Return a memory node that holds an empty qcow2 image; *options* as ``create -o`` has them."""
    node = MemoryNode()
    keeper = Disk(node)  # holds the node while the driver opens and closes it
    qcow2_create.create(node, size, options)
    graph.release(keeper.edge)
    return node


def qcow2_node(
    file: BlockNode, *, backing: BlockNode | None = None, writable: bool = True, **options: Any
) -> BlockNode:
    """Open the qcow2 image in *file*; the node belongs to nobody yet."""
    description = {"driver": "qcow2", "file": file, "backing": backing, "read-only": not writable, **options}
    return Opening(REGISTRY).open(description)


def qcow2_disk(size: int, *, backing: BlockNode | None = None, **options: Any) -> Disk:
    """Return a writable disk over a new qcow2 image in memory."""
    return Disk(qcow2_node(qcow2_file(size, **options), backing=backing), writable=True)


def blkdebug_over(file: BlockNode) -> Any:
    """Return a blkdebug node without rules over *file*."""
    return Opening(REGISTRY).open({"driver": "blkdebug", "image": file, "read-only": not file.writable})


def submit(node: BlockNode, batch: Sequence[Request]) -> None:
    """Do *batch* on *node*, and raise the error of its first request that failed."""
    failures = node.submit(batch)
    if failures:
        raise failures[min(failures)]


class Worker(threading.Thread):
    """A thread that keeps its error for :meth:`done`."""

    def __init__(self, work: Callable[..., object], *arguments: object) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._arguments = arguments
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work(*self._arguments)
        except BaseException as error:  # noqa: BLE001 - raised by done
            self.error = error

    def done(self) -> None:
        """Wait for the end and raise what went wrong."""
        self.join(PATIENCE)
        assert not self.is_alive(), "a thread did not end"
        if self.error is not None:
            raise self.error


@contextmanager
def impatient_interpreter() -> Iterator[None]:
    """Have the interpreter change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)

"""The contract of nodes, over exports of real servers of several makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cowhand.block.node.node import BlockNode
from cowhand.block.protocols.nbd.node import NbdNode, NbdOptions
from cowhand.testing.nodes import NodeContract
from tests.nbd.servers import Argument, nbdkit, qemu_nbd, require_nbdkit
from tests.tools.qemu import require_qemu_nbd


class Exported(NodeContract):
    """Nodes over a file that a server serves. ``arguments`` are the server's."""

    arguments: tuple[Argument, ...] = ()

    @pytest.fixture(autouse=True)
    def servers(self) -> Iterator[None]:
        with ExitStack() as self.stack:
            yield

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        (folder / "disk").write_bytes(content)
        return NbdNode.open(None, NbdOptions(filename=self.serve(folder), read_only=not writable), {})

    def serve(self, folder: Path) -> str:
        raise NotImplementedError

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        return (folder / "disk").read_bytes()


@require_qemu_nbd
class TestQemuNbd(Exported):
    """qemu-nbd: structured replies, block status, fast zeroes."""

    def serve(self, folder: Path) -> str:
        server = qemu_nbd(folder, folder / "disk", "--discard=unmap", "--detect-zeroes=unmap")
        return self.stack.enter_context(server).uri


@require_nbdkit
class TestNbdkit(Exported):
    """nbdkit with its defaults: several connections at once."""

    filters: tuple[str, ...] = ()

    def serve(self, folder: Path) -> str:
        words = [*(f"--filter={name}" for name in self.filters), "file", folder / "disk", *self.arguments]
        return self.stack.enter_context(nbdkit(folder, *words)).uri


@require_nbdkit
class TestLargeBlocks(TestNbdkit):
    """A server that takes whole blocks of 4096 bytes, and 64 KiB at most, and fails what is not."""

    filters = ("blocksize-policy",)
    arguments = (
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    )


@require_nbdkit
class TestPlainServer(TestNbdkit):
    """A server without structured replies, zeroes or a second connection, that is slow and replies out of order."""

    filters = ("nozero", "multi-conn", "delay")
    arguments = ("zeromode=none", "multi-conn-mode=disable", "wdelay=1ms", "rdelay=1ms")

    def serve(self, folder: Path) -> str:
        words = [*(f"--filter={name}" for name in self.filters), "--no-sr", "file", folder / "disk", *self.arguments]
        return self.stack.enter_context(nbdkit(folder, *words)).uri

"""A device that keeps nothing: the drivers "null-co" and "null-aio", for measuring everything above the medium.

Source: QEMU's ``BlockdevOptionsNull``. Writes vanish; reads give zeroes with ``read-zeroes``, and otherwise leave the buffer as it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.node.node import READ, BlockNode, Capabilities, Failures, Request, Zeroing
from cowhand.block.node.options import NodeOptions, option, strong_options
from cowhand.core.buffers import Buffer, fill_zero
from cowhand.core.errors import InvalidArgument
from cowhand.core.extents import ALLOCATED, OFFSET, ZERO, ExtentBatch
from cowhand.core.units import MAX_SIZE

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening

DEFAULT_SIZE = 1 << 30  #: QEMU's


class NullOptions(NodeOptions):
    """Options of both drivers."""

    filename: str | None = option(help="'null-co://' and nothing else", strong=False)
    size: int = option(DEFAULT_SIZE, kind="size", help="size of the null block")
    latency_ns: int = option(
        0,
        kind="int",
        name="latency-ns",
        help="nanoseconds (approximated) to wait before completing a request",
        strong=False,
    )
    read_zeroes: bool = option(False, kind="bool", help="return zeroes when read")


class NullNode(BlockNode):
    """A disk of the given size without content. Nothing is checked, kept or allocated, so the size costs nothing."""

    driver: ClassVar[str] = "null-co"
    options_class: ClassVar[type[NodeOptions]] = NullOptions
    options: NullOptions

    def __init__(self, options: NullOptions) -> None:
        super().__init__(options)
        self._delay = options.latency_ns / 1e9
        self.immediate = not self._delay
        self.capabilities = Capabilities(writable=self.writable, zeroes=Zeroing.NATIVE, discard=True, fua=True)

    @classmethod
    def open(cls, opening: Opening | None, options: NodeOptions, given: dict[str, Any]) -> NullNode:
        assert isinstance(options, NullOptions)
        if options.filename is not None:
            cls.parse_filename(options.filename)
        if options.latency_ns < 0:
            raise InvalidArgument("latency-ns is invalid")
        if not 0 <= options.size <= MAX_SIZE:
            raise InvalidArgument(f"size {options.size} is out of range")
        return cls(options)

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        if filename != f"{cls.driver}://":
            raise InvalidArgument(f"The only allowed filename for this driver is '{cls.driver}://'")
        return {}

    @property
    def size(self) -> int:
        return self.options.size

    @property
    def filename(self) -> str:
        strong = strong_options(self.options)
        if not strong:
            return f"{self.driver}://"
        import json

        from cowhand.block.node.naming import ordered

        return "json:" + json.dumps(ordered({"driver": self.driver, **strong}))

    def allocated_size(self) -> int | None:
        return 0

    def _wait(self) -> None:
        if self._delay:
            time.sleep(self._delay)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self._wait()
        if self.options.read_zeroes:
            fill_zero(memoryview(buffer))

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        self._wait()

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self._wait()

    def discard(self, offset: int, length: int) -> None:
        self._wait()

    def flush(self) -> None:
        self._wait()

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        self._wait()  # the requests of a batch are in flight together
        if self.options.read_zeroes:
            for kind, _, what in batch:
                if kind == READ:
                    fill_zero(memoryview(what))
        return None

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        batch = ExtentBatch()
        # Without read-zeroes nobody decides the content: QEMU tells neither data nor zero.
        batch.add(offset, length, ZERO | ALLOCATED | OFFSET if self.options.read_zeroes else OFFSET, offset, self)
        return batch


class NullAioNode(NullNode):
    """The same under QEMU's other name; there the difference is in how requests are completed."""

    driver: ClassVar[str] = "null-aio"

"""The filter "compress": what is written through it is stored compressed.

Source: QEMU's ``docs/system/qemu-block-drivers`` and ``block/filter-compress``'s description in ``qapi/block-core.json`` ("compress", since 4.2).
Whole allocation units are written, so requests are padded to them. As in QEMU, a unit that holds data already cannot be compressed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cowhand.block.filters.base import PassingFilter
from cowhand.block.format_io.compressed_writes import can_compress, write_compressed
from cowhand.block.format_io.format_node import FormatNode
from cowhand.core.buffers import Buffer
from cowhand.core.errors import NotSupported


class CompressNode(PassingFilter):
    """A filter over a format that can compress. Raises NotSupported over another one."""

    driver: ClassVar[str] = "compress"

    def start(self) -> None:
        super().start()
        lower = self.below.node
        if not can_compress(lower):
            raise NotSupported(f"Compression is not supported for underlying format: {lower.driver}")
        self.limits = self.limits._replace(request_alignment=self._format.allocation_unit)

    @property
    def _format(self) -> FormatNode:
        node = self.below.node
        assert isinstance(node, FormatNode)
        return node

    def read_into(self, offset: int, buffer: Buffer) -> None:
        # Padded to whole units, which may reach past the end.
        inside = min(len(buffer), max(0, self.size - offset))
        view = memoryview(buffer)
        self.below.read_into(offset, view[:inside])
        view[inside:] = bytes(len(view) - inside)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        data = b"".join(buffers)
        inside = min(len(data), self.size - offset)
        write_compressed(self._format, self.below, offset, memoryview(data)[:inside])
        if fua:
            self.below.flush()

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.below.write_zeroes(offset, min(length, self.size - offset), unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, min(length, self.size - offset))

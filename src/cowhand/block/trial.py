"""A node over which a large change of an image is tried out: unlike a rehearsal it keeps no order, only the last content of each page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import ClassVar

from cowhand.block import graph
from cowhand.block.node import ALL_PERMISSIONS, CONSISTENT_READ, BlockNode, Capabilities, Child, Role, Zeroing
from cowhand.block.options import NodeOptions
from cowhand.core.buffers import Buffer
from cowhand.core.errors import NotSupported, UnsupportedFeature

#: What is kept together: most that is written are whole tables.
PAGE = 64 << 10
#: Bytes of pages that a trial may change: all tables of a full image of 4 TiB, moved twice. They are on disk, but for the first few.
MAX_BYTES = 2 << 30
_IN_MEMORY = 8 << 20


class TrialNode(BlockNode):
    """Takes writes for a node that is only read. Used by one thread. Raises UnsupportedFeature past :data:`MAX_BYTES`."""

    driver: ClassVar[str] = "trial"
    is_filter: ClassVar[bool] = True

    def __init__(self, inner: BlockNode) -> None:
        super().__init__(NodeOptions(read_only=False))
        self.limits = inner.limits
        self.capabilities = Capabilities(writable=True, zeroes=Zeroing.EMULATED, resizable=True)
        self._places: dict[int, int] = {}  #: page: where its content is kept
        self._kept = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - closed with the node
        self._size = inner.size
        self.below = graph.attach(self, "file", inner, Role.FILTERED)

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        return CONSISTENT_READ, ALL_PERMISSIONS

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            page, within = divmod(offset + done, PAGE)
            step = min(PAGE - within, len(view) - done)
            place = self._places.get(page)
            if place is None:
                # As far as no page was changed, in one go.
                while done + step < len(view) and (offset + done + step) // PAGE not in self._places:
                    step = min(step + PAGE, len(view) - done)
                self._read_below(offset + done, view[done : done + step])
            else:
                self._kept.seek(place + within)
                view[done : done + step] = self._kept.read(step)
            done += step

    def _read_below(self, offset: int, view: memoryview) -> None:
        have = min(len(view), max(0, self.below.node.size - offset))
        if have:
            self.below.read_into(offset, view[:have])
        view[have:] = bytes(len(view) - have)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            done = 0
            while done < len(view):
                page, within = divmod(offset, PAGE)
                step = min(PAGE - within, len(view) - done)
                self._kept.seek(self._place(page) + within)
                self._kept.write(view[done : done + step])
                done += step
                offset += step
        self._size = max(self._size, offset)

    def _place(self, page: int) -> int:
        """Return where *page* is kept, from now on if it was not before."""
        place = self._places.get(page)
        if place is None:
            place = len(self._places) * PAGE
            if place + PAGE > MAX_BYTES:
                raise UnsupportedFeature(
                    f"more than {MAX_BYTES >> 20} MiB of the image would be changed, which cannot be tried out first",
                    path=self.filename, hint="Do it without trying, on a copy.",
                )  # fmt: skip
            content = bytearray(PAGE)
            self._read_below(page * PAGE, memoryview(content))
            self._kept.seek(place)
            self._kept.write(content)
            self._places[page] = place
        return place

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if not fallback:
            raise NotSupported("a trial writes zeroes as bytes")
        while length:
            piece = min(length, PAGE)
            self.write(offset, (bytes(piece),))
            offset, length = offset + piece, length - piece

    def flush(self) -> None:
        """Nothing is ever stable."""

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if size < self._size:
            raise NotSupported("what is cut off cannot be tried out", path=self.filename)
        self._size = size

    def close(self) -> None:
        self._kept.close()

"""A node over which a large change of an image is tried out: unlike a rehearsal it keeps no order, only the last content of each page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cowhand.block.node.node import BlockNode
from cowhand.core.buffers import Buffer
from cowhand.image.shadow.node import StandInNode

#: What is kept together: most that is written are whole tables.
PAGE = 64 << 10
#: Bytes of pages that a trial may change: all tables of a full image of 4 TiB, moved twice. They are on disk, but for the first few.
MAX_BYTES = 2 << 30
_IN_MEMORY = 8 << 20


class TrialNode(StandInNode):
    """Takes writes for a node that is only read. Used by one thread. Raises UnsupportedFeature past :data:`MAX_BYTES`."""

    driver: ClassVar[str] = "trial"
    max_bytes, in_memory, zero_piece = MAX_BYTES, _IN_MEMORY, PAGE
    way_out = "Do it without trying, on a copy."

    def __init__(self, inner: BlockNode) -> None:
        super().__init__(inner)
        self._places: dict[int, int] = {}  #: page: where its content is kept

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
            self._check_room(place + PAGE)
            content = bytearray(PAGE)
            self._read_below(page * PAGE, memoryview(content))
            self._kept.seek(place)
            self._kept.write(content)
            self._places[page] = place
        return place

    def flush(self) -> None:
        """Nothing is ever stable."""

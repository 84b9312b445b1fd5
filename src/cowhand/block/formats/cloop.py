"""The cloop format: the compressed loop devices of Knoppix, version 2, to read (``cloop`` 2.0, ``compressed_loop.h``).

A shell script of 128 bytes, block bytes and count, an offset for each block and for the end, then the blocks, deflated. Numbers are big-endian.
"""

from __future__ import annotations

import operator
import sys
import zlib
from array import array
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.mapped import ReadOnlyFormat
from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA

if TYPE_CHECKING:
    from cowhand.block.node.node import Child
    from cowhand.block.opening.opening import Opening

SECTOR = 512
_SCRIPT, _TABLE = 128, 136
MAX_BLOCK = 64 << 20  #: bytes; QEMU
MAX_BLOCKS = ((1 << 32) - 2) // 8  #: QEMU
MAX_TABLE = 512 << 20  #: bytes; QEMU


class CloopNode(ReadOnlyFormat):
    """A compressed loop device. All of its blocks are stored, and all are compressed."""

    driver: ClassVar[str] = "cloop"

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        head = bytearray(_TABLE)
        self.file.read_into(0, head)
        block, count = (int.from_bytes(head[at : at + 4], "big") for at in (_SCRIPT, _SCRIPT + 4))
        if block % SECTOR:
            raise self.wrong(f"block_size {block} must be a multiple of 512", _SCRIPT)
        if not block:
            raise self.wrong("block_size cannot be zero", _SCRIPT)
        if block > MAX_BLOCK:
            raise self.wrong(f"block_size {block} must be {MAX_BLOCK >> 20} MB or less", _SCRIPT)
        if count > MAX_BLOCKS:
            raise self.wrong(f"n_blocks {count} must be {MAX_BLOCKS} or less", _SCRIPT + 4)
        table = (count + 1) * 8
        if table > MAX_TABLE:
            raise self.wrong("image requires too many offsets, try increasing block size", _SCRIPT + 4)
        if _TABLE + table > self.file.node.size:
            raise self.wrong(f"the table of {count} blocks does not end inside the file", _SCRIPT + 4)
        offsets = array("Q", bytes(table))
        self.file.read_into(_TABLE, memoryview(offsets).cast("B"))
        if sys.byteorder == "little":
            offsets.byteswap()
        self._block, self._offsets, self._size = block, offsets, block * count
        self._last: tuple[int, bytes] = (-1, b"")
        sizes = array("q", map(operator.sub, memoryview(offsets)[1:], offsets)) if self._rises(offsets) else None
        if sizes is None or (sizes and max(sizes) > 2 * MAX_BLOCK):
            index = next(n for n in range(1, count + 1) if not 0 <= offsets[n] - offsets[n - 1] <= 2 * MAX_BLOCK)
            if offsets[index] < offsets[index - 1]:
                text = f"offsets not monotonically increasing at index {index}, image file is corrupt"
            else:
                text = f"invalid compressed block size at index {index}, image file is corrupt"
            raise self.wrong(text, _TABLE + index * 8)

    @staticmethod
    def _rises(offsets: array[int]) -> bool:
        return offsets[-1] < 1 << 63 and all(map(operator.le, offsets, memoryview(offsets)[1:]))

    @property
    def size(self) -> int:
        return self._size

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        number, within = divmod(offset, self._block)
        return min(length, self._block - within), DATA | ALLOCATED | COMPRESSED, self.file, number

    def decode(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        within = offset % self._block
        view[:] = self._unpacked(run[3])[within : within + len(view)]

    def _unpacked(self, number: int) -> bytes:
        """Return block *number*, which never takes more memory than its size and that of what is stored."""
        last = self._last
        if last[0] == number:
            return last[1]
        begin, end = self._offsets[number : number + 2]
        if end > self.file.node.size:
            raise self.wrong(f"block {number} ends at {end:#x}, behind the end of the file", begin)
        packed = bytearray(end - begin)
        self.file.read_into(begin, packed)
        try:
            data = zlib.decompressobj().decompress(packed, self._block)
        except zlib.error as error:
            raise self.wrong(f"block {number} cannot be unpacked: {error}", begin, "Input/output error") from None
        if len(data) < self._block:
            raise self.wrong(f"block {number} has {len(data)} bytes, not {self._block}", begin, "Input/output error")
        self._last = number, data
        return data

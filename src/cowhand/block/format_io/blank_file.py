"""What a format does first with the file that is to become a new image: no byte of what it held may be taken for the image's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.core.buffers import ZEROES
from cowhand.core.errors import NotSupported

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

SECTOR = 512


def make_empty(file: BlockNode, size: int = 0, *, preallocation: str = "off") -> None:
    """Cut the writable protocol node *file* to nothing, then let it grow to *size* bytes of zeroes.

    A device or an export keeps its size and, but for the first sector, where an image is recognised, its content; raises what the node says of
    growing when it is shorter than *size*.
    """
    if file.capabilities.resizable:
        file.resize(0, shrink=True)
        if size:
            file.resize(size, preallocation=preallocation)
        return
    check_room(file, size, preallocation=preallocation)
    block = file.limits.request_alignment
    length = min(-(-SECTOR // block) * block, file.size - file.size % block)
    if length:
        file.write(0, (ZEROES[:length],))


def check_room(file: BlockNode, size: int, *, preallocation: str = "off") -> None:
    """Raise what *file* says of growing, when it keeps its size and is shorter than *size* bytes."""
    if file.capabilities.resizable or (size <= file.size and preallocation == "off"):
        return
    try:
        file.resize(max(size, file.size), preallocation=preallocation)
    except NotSupported as error:
        # QEMU has words of its own for a file that may be longer than is needed, but not shorter.
        error.qemu_message = error.qemu_message.replace("Cannot resize", "Cannot grow")
        raise

"""Does an image have preallocated metadata? Then its data clusters may be holes of the file, and block status has to ask the file.

QEMU's rule: it has, when reference counts tell of noticeably more clusters than the file occupies on its medium.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def detect(node: Qcow2Node) -> bool:
    """Return whether *node*'s clusters in use exceed its allocated size by a tenth (and by two clusters); damaged counts tell of no such thing."""
    try:
        return _more_in_use(node)
    except CowhandError:
        return False


def _more_in_use(node: Qcow2Node) -> bool:
    occupied = node.file.node.allocated_size()
    if occupied is None:
        return False
    real = occupied // node.cluster_size
    threshold = max(real * 10 // 9, real + 2)
    refcounts = node.refcounts
    # Behind the last block nothing is counted, however far behind it the file ends.
    counted = -(-len(refcounts.table.rstrip(b"\0")) // 8) * refcounts.per_block
    end = min(-(-node.file.node.size // node.cluster_size), counted)
    if end < threshold:
        return False
    used = 0
    position = 0
    while position < end and used < threshold and used + end - position >= threshold:
        step = min(refcounts.per_block - position % refcounts.per_block, end - position)
        with node.lock:
            block = refcounts.block(position // refcounts.per_block)
            if block is not None:
                used += step - refcounts.counts.zeros(block.data, position % refcounts.per_block, step)
        position += step
    return used >= threshold

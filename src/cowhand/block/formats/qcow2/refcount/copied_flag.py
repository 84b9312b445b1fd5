"""The COPIED bits of qcow2's active tables (QEMU ``docs/interop/qcow2``, "L1 table entry", "Standard Cluster Descriptor").

Set where a cluster has one reference, it allows writing in place. Fitting the bits to the counts writes tables at once, whatever their number.
"""

from __future__ import annotations

import sys
from array import array
from operator import sub
from typing import TYPE_CHECKING

from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import adjoining, words_of
from cowhand.block.formats.qcow2.refcount.bulk_update import PresentCounts, l2_tables, read_table
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.refcount.counted import Tally

_LITTLE = sys.byteorder == "little"
_TOP = bytes(byte & 0x7F for byte in range(256))


def cleared(l1: bytes) -> bytes:
    """Return the L1 table without its COPIED bits."""
    out = bytearray(l1)
    out[::8] = out[::8].translate(_TOP)
    return bytes(out)


def fit_flags(
    node: Qcow2Node,
    counts: Tally | PresentCounts,
    l1: bytes | None = None,
    *,
    nothing_alone: bool = False,
    keep: bool = False,
) -> None:
    """Set COPIED where *counts* is 1 and clear it elsewhere, in the L2 tables that *l1* names; what *counts* does not know stays.

    Without *l1* it is the active table that is fitted, its own bits in memory and its L2 tables on disk; *nothing_alone*: no count is 1.
    Flushes nothing. The caller has the caches empty and everything held. With *keep*, tables that cannot be written stay in the cache as
    changed, for the next write-back to try again, and the first error is raised when all have been through.
    """
    failure: CowhandError | None = None
    if l1 is None:
        l1 = bytes(node.mapping.l1.data[: node.header.l1_size * L.ENTRY_SIZE])
        for index, entry in enumerate(words_of(l1)):
            host = entry & L.L1_OFFSET_MASK
            count = counts.get(host // node.cluster_size) if host else 0
            if count and (count == 1) != bool(entry & L.COPIED):
                node.mapping.set_l1(index, entry ^ L.COPIED)
    extended = bool(node.header.incompatible & L.INCOMPAT_EXTENDED_L2)
    for host in l2_tables(node, l1):
        data = read_table(node, host)
        new = (
            _all_cleared(data, 2 if extended else 1)
            if nothing_alone
            else _fitted(node, data, counts, 2 if extended else 1)
        )
        if new == data:
            continue
        try:
            node.write_metadata(host, new)
        except CowhandError as error:
            if not keep:
                raise
            failure = failure or error
            _keep(node, host, new)
    if failure is not None:
        raise failure


def _keep(node: Qcow2Node, host: int, data: bytes) -> None:
    """Put an active L2 table that is not on disk as it should be into the cache."""
    for index, entry in enumerate(node.mapping.l1_entries()):
        if entry & L.L1_OFFSET_MASK == host:
            table = Table(bytearray(data), host)
            table.touch_all()
            node.mapping.cache.put(index, table)


def _all_cleared(data: bytes, stride: int) -> bytes:
    out = bytearray(data)
    out[:: 8 * stride] = out[:: 8 * stride].translate(_TOP)
    return bytes(out)


def _fitted(node: Qcow2Node, data: bytes, counts: Tally | PresentCounts, stride: int) -> bytes:
    if counts.numpy is not None:
        return _fitted_fast(node, data, counts, stride)
    words = words_of(data)
    size = node.cluster_size
    in_order = words[-stride] - words[0] == (len(words) // stride - 1) * size
    changed = None if in_order else _fit_scattered(words, counts, stride, size)
    if changed is None:
        changed = _fit_runs(words, counts, stride, size)
    if not changed:
        return data
    if _LITTLE:
        words.byteswap()
    return words.tobytes()


def _fit_scattered(words: array[int], counts: Tally | PresentCounts, stride: int, size: int) -> bool | None:
    """Fit the bits in *words* where many clusters lie apart, and tell whether any changed; None, and nothing done, where they do not."""
    mask = L.L2_OFFSET_MASK
    placed = [
        index for index in range(0, len(words), stride) if words[index] & mask and not words[index] & L.ENTRY_COMPRESSED
    ]
    clusters = [(words[index] & mask) // size for index in placed]
    if len(placed) < 2 or list(map(sub, clusters[1:], clusters)).count(1) * 4 > len(clusters) * 3:
        return None
    changed = False
    for index, count in zip(placed, counts.each(clusters), strict=True):
        if count and (count == 1) != words[index] >> 63:
            words[index] ^= L.COPIED
            changed = True
    return changed


def _fit_runs(words: array[int], counts: Tally | PresentCounts, stride: int, size: int) -> bool:
    """Fit the bits in *words* run by run, and tell whether any changed."""
    changed = False
    position, end = 0, len(words)
    while position < end:
        entry = words[position]
        if not entry & L.L2_OFFSET_MASK or entry & L.ENTRY_COMPRESSED:
            position += stride
            continue
        run = adjoining(words, position, size, stride)
        first = (entry & L.L2_OFFSET_MASK) // size
        for value in (1, 2):
            if counts.is_all(first, run, value):
                if (value == 1) != bool(entry & L.COPIED):
                    changed = True
                    new = entry ^ L.COPIED
                    words[position : position + run * stride : stride] = array("Q", range(new, new + run * size, size))
                break
        else:
            for index in range(run):
                count = counts.get(first + index)
                if count and (count == 1) != bool(entry & L.COPIED):
                    changed = True
                    words[position + index * stride] ^= L.COPIED
        position += run * stride
    return changed


def _fitted_fast(node: Qcow2Node, data: bytes, counts: Tally | PresentCounts, stride: int) -> bytes:
    numpy = counts.numpy
    words = numpy.frombuffer(data, ">u8").astype("u8")
    entries = words[::stride]
    hosts = entries & numpy.uint64(L.L2_OFFSET_MASK)
    chosen = numpy.flatnonzero((hosts != 0) & (entries & numpy.uint64(L.ENTRY_COMPRESSED) == 0))
    if not len(chosen):
        return data
    have = counts.gather((hosts[chosen] >> numpy.uint64(node.header.cluster_bits)).astype("i8"))
    known = have != 0
    chosen, have = chosen[known], have[known]
    bit = numpy.uint64(L.COPIED)
    plain = entries[chosen] & ~bit
    entries[chosen] = numpy.where(have == 1, plain | bit, plain)
    out: bytes = words.astype(">u8").tobytes()
    return out

"""Preallocation for qcow2: every guest cluster of a range gets its place now, so that later writes only write data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.format import Kind

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def preallocate(node: Qcow2Node, begin: int, end: int, mode: str) -> None:
    """Give the clusters of ``[begin, end)`` a place: mode "metadata" leaves holes there, "falloc" reserves them, "full" writes zeroes."""
    unit = node.cluster_size
    position = begin - begin % unit
    last = 0
    while position < end:
        reservation = node.claim(position, -(-(end - position) // unit) * unit, Kind.DATA)
        if reservation is None:
            position += max(unit, node.map(position, end - position)[0] // unit * unit)
            continue
        node.finish(reservation)
        last = max(last, reservation.host + reservation.length)
        position = reservation.offset + reservation.length
    node.flush()
    file = node.file.node
    if mode == "metadata":
        # Without a byte at the end the file would be shorter than what it promises.
        if last > file.size:
            file.resize(last)
    elif last:
        file.resize(max(last, file.size), preallocation=mode)

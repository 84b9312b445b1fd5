"""Preallocation for qcow2: every guest cluster of a range gets its place now, so that later writes only write data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.emptying import check_room
from cowhand.block.node import Zeroing
from cowhand.block.reserving import Kind, Reservation
from cowhand.core.buffers import ZEROES, ZEROES_SIZE
from cowhand.core.errors import CowhandError
from cowhand.core.extents import DATA, OFFSET

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def preallocate(node: Qcow2Node, begin: int, end: int, mode: str, *, transparent: bool = False) -> None:
    """Give the clusters of ``[begin, end)`` a place: mode "metadata" leaves holes there, "falloc" reserves them, "full" writes zeroes.

    What held nothing before reads as zeroes then; with *transparent* subclusters stay what they are, and a backing file shows. A cluster that
    the range shares with what lies before *begin* is left alone unless it is empty.
    """
    unit = node.cluster_size
    position = begin - begin % unit
    if position < begin and not _empty(node, position, transparent):
        position += unit
    last = 0
    while position < end:
        reservation = node.claim(position, -(-(end - position) // unit) * unit, Kind.DATA)
        if reservation is None:
            position += max(unit, node.map(position, end - position)[0] // unit * unit)
            continue
        if node.extended and transparent:
            from cowhand.block.formats.qcow2.subclusters import without_data

            without_data(reservation.state.table, reservation.state)
        try:
            _prepare(node, reservation, mode)
        except BaseException as error:
            node.give_up(reservation, error)
            raise
        node.finish(reservation)
        last = max(last, reservation.host + reservation.length)
        position = reservation.offset + reservation.length
    node.flush()
    if node.external:
        from cowhand.block.formats.qcow2.datafile import resize

        resize(node, end, mode)
        return
    # Without a byte at the end the file would be shorter than what it promises.
    if last > node.file.node.size:
        node.file.node.resize(last)


def _empty(node: Qcow2Node, position: int, transparent: bool) -> bool:
    """Tell whether the cluster at *position* has no place, holds nothing, and shows nothing that a place would hide."""
    length, flags, _, _ = node.map(position, node.cluster_size)
    if length < node.cluster_size or flags & (OFFSET | DATA):
        return False
    backing = node.backing
    return bool(flags) or backing is None or backing.node.size <= position or (transparent and node.extended)


def _prepare(node: Qcow2Node, reservation: Reservation, mode: str) -> None:
    """Have the reserved place read as zeroes, and occupy space unless only metadata are wanted."""
    if node.external:
        return  # what a data file holds becomes the disk's content
    file, end = node.file, reservation.host + reservation.length
    try:
        check_room(file.node, end)
    except CowhandError as error:
        raise error.within(qemu="Could not resize image") from None
    if not reservation.fresh:
        # It held something before.
        if file.node.capabilities.zeroes is not Zeroing.NONE:
            file.write_zeroes(reservation.host, reservation.length, unmap=mode == "metadata")
        else:
            for position in range(reservation.host, end, ZEROES_SIZE):
                file.write(position, (ZEROES[: min(ZEROES_SIZE, end - position)],))
    elif mode != "metadata" and end > file.node.size:
        # Before the tables are written behind it, which would leave it a hole.
        file.node.resize(end, preallocation=mode)

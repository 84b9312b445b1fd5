"""Preallocation of metadata for qcow2: every guest cluster of a range gets its place now, so that later writes only write data.

It is as if the guest wrote the range, but for the bytes: what shares its first and last unit with it is copied, since QEMU does so and a
file's length shows it. For "falloc" and "full" inside the image itself see :mod:`cowhand.block.formats.qcow2.resize.preallocate_run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.format_io.blank_file import check_room
from cowhand.block.format_io.reservations import Kind, Reservation
from cowhand.block.node.node import Zeroing
from cowhand.core.buffers import ZEROES, ZEROES_SIZE
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def preallocate(node: Qcow2Node, begin: int, end: int, mode: str) -> None:
    """Give the clusters of ``[begin, end)`` a place, holes of the file; with a data file *mode* says how that grows to *end*.

    What held nothing before reads as zeroes then, but subclusters stay what they are: a backing file shows. What lies before *begin* keeps its
    content.
    """
    position = begin
    padded = True
    if node.external:
        from cowhand.block.formats.qcow2.cluster.data_file import resize

        padded = node.data_child.node.size < end  # a longer one keeps what it has
        resize(node, end, mode)
    while position < end:
        reservation = node.claim(position, end - position, Kind.DATA, continues=position > begin)
        if reservation is None:
            position += node.map(position, end - position)[0]
            continue
        try:
            if node.extended:
                from cowhand.block.formats.qcow2.cluster.extended_allocation import without_data

                without_data(reservation.state.table, reservation.state)
            _fill(node, reservation, position, min(end, reservation.end) if padded else reservation.end)
        except BaseException as error:
            node.give_up(reservation, error)
            raise
        node.finish(reservation)
        position = reservation.end
    node.flush()


def _fill(node: Qcow2Node, reservation: Reservation, begin: int, end: int) -> None:
    """Have the reserved place read as zeroes, but for what it holds before *begin*; behind *end* its zeroes are written."""
    shift = reservation.host - reservation.offset
    if not node.external:  # what a data file holds becomes the disk's content
        _clear(node, reservation, shift)
    head, tail = begin - reservation.begin, reservation.end - end
    if head > 0:
        data = memoryview(bytearray(head))
        node.read_into(reservation.begin, data)
        node.store(node.data_child, shift + reservation.begin, reservation.begin, (data,))
    if tail > 0:
        node.store(node.data_child, shift + end, end, [ZEROES[: tail - at] for at in range(0, tail, ZEROES_SIZE)])


def _clear(node: Qcow2Node, reservation: Reservation, shift: int) -> None:
    file, begin, end = node.file, shift + reservation.begin, shift + reservation.end
    try:
        check_room(file.node, end)
    except CowhandError as error:
        raise error.within(qemu="Could not resize image") from None
    if end > file.node.size:
        # Before entries refer to it: without a byte at the end the file would be shorter than what it promises.
        file.node.resize(end)
    if reservation.fresh:
        return
    # It held something before.
    if file.node.capabilities.zeroes is not Zeroing.NONE:
        file.write_zeroes(begin, end - begin, unmap=True)
        return
    for position in range(begin, end, ZEROES_SIZE):
        file.write(position, (ZEROES[: min(ZEROES_SIZE, end - position)],))

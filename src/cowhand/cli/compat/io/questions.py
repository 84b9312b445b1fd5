"""``info``, ``length``, ``map``, ``alloc``, ``help``: commands that change nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cowhand.cli.compat import program
from cowhand.cli.compat.img.records import tree, whole_sectors
from cowhand.cli.compat.io import table
from cowhand.cli.compat.io.parsing import SECTOR, number
from cowhand.cli.compat.io.report import failed, number_of
from cowhand.cli.compat.io.requests import the_disk
from cowhand.cli.compat.sizes import precise
from cowhand.core.errors import CowhandError
from cowhand.core.extents import ALLOCATED
from cowhand.drivers import REGISTRY

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.cli.compat.io.session import Session


def info(session: Session, words: Sequence[str]) -> bool:
    """Print the format and what it tells of itself."""
    node: Any = session.image
    print(f"format name: {node.driver}")
    if REGISTRY.get(node.driver).prefixes:
        print(f"format name: {node.driver}")  # its name as a protocol, which QEMU prints alike
    below = node
    while below.driver not in ("qcow2", "file", "host_device"):
        primary = below.primary
        if primary is None:
            return False
        below = primary.node
    print(f"cluster size: {precise(getattr(below, 'cluster_size', None) or 0)}")
    print(f"vm state offset: {precise(getattr(below, 'vmstate_offset', 0))}")
    specific = node.format_specific()
    if specific:
        print("Format specific information:")
        for line in tree(specific, 1):
            print(line)
    return True


def length(session: Session, words: Sequence[str]) -> bool:
    """Print the length of the disk."""
    print(precise(whole_sectors(the_disk(session).size)))
    return True


def _allocation(disk: Disk, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, length, whether the top layer allocates it), merged; the rest of a last, incomplete sector is as what comes before it."""
    start, count, last = offset, 0, False
    inside = min(end, disk.size)
    if offset < inside:
        for batch in disk.extents(offset, inside - offset, depth=1):
            for row in batch:
                allocated = bool(row.flags & ALLOCATED)
                if count and allocated == last:
                    count += row.length
                    continue
                if count:
                    yield start, count, last
                start, count, last = row.start, row.length, allocated
    if count:
        yield start, count + end - inside, last


def map_command(session: Session, words: Sequence[str]) -> bool:
    """Print which ranges the top layer allocates."""
    disk = the_disk(session)
    try:
        for start, count, allocated in _allocation(disk, 0, whole_sectors(disk.size)):
            state = "    allocated" if allocated else "not allocated"
            print(f"{precise(count)} ({count:#x}) bytes {state} at offset {precise(start)} ({start:#x})")
    except CowhandError as error:
        program.error(f"Failed to get allocation status: {os.strerror(number_of(error))}")
        return False
    return True


def alloc(session: Session, words: Sequence[str]) -> bool:
    """Print how many bytes of a range the top layer allocates."""
    disk = the_disk(session)
    offset = number(words[1])
    count = number(words[2]) if len(words) == 3 else SECTOR
    end = min(whole_sectors(disk.size), offset + count)
    try:
        total = sum(length for _, length, allocated in _allocation(disk, offset, end) if allocated)
    except CowhandError as error:
        raise failed("is_allocated", error) from error
    print(f"{total}/{max(0, end - offset)} bytes allocated at offset {precise(offset)}")
    return True


def help_command(session: Session, words: Sequence[str]) -> bool:
    """Print one line a command, or everything about one."""
    if len(words) == 1:
        for command in table.known():
            print(table.usage(command.name, command))
        print("\nUse 'help commandname' for extended help.")
        return True
    found = table.find(words[1])
    if found is None:
        print(f"command {words[1]} not found")
        return False
    print(table.usage(words[1], found))
    text = table.EXTENDED.get(found.name)
    if text:
        print(text)
    return True

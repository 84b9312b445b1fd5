"""Epochs: the process-wide sequence that orders requests, leases and frees.

A request takes a number when it begins and keeps it while it is in flight; so does a lease (a host offset given out by a format). What is
freed gets a number too, and may be used again only when every number in flight above it is greater: then nobody can still be writing
to where it lay. The in-flight table of a disk is a plain dict, whose single operations are atomic under the interpreter lock.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

from cowhand.core.errors import NotSupported

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

if not getattr(sys, "_is_gil_enabled", lambda: True)():
    raise NotSupported(
        "cowhand relies on the interpreter lock and does not run on a free-threaded build with the lock turned off",
        hint="Start Python with PYTHON_GIL=1.",
    )

#: Take the next number of the sequence: one C call, hence atomic.
next_number = itertools.count(1).__next__


def oldest_in_flight(node: BlockNode) -> int:
    """Return the smallest number in flight in any disk above *node*, or a fresh number when there is none."""
    from cowhand.block.graph.graph import disks_above

    fresh = next_number()
    oldest = fresh
    for disk in disks_above((node,)):
        numbers = list(disk.in_flight)
        if numbers:
            oldest = min(oldest, min(numbers))
    return oldest

"""Checking a table of blocks: each lies inside the file and is named once. Nothing is mended: either of two may be right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.format_io.block_table import PACKED, ZEROED
from cowhand.block.node.records import CheckResult, Finding, Kind

if TYPE_CHECKING:
    from cowhand.block.format_io.block_table import BlockTableFormat
    from cowhand.block.node.records import Say

OUTSIDE = Kind("block-outside-file", "ERROR block {cluster} lies at {host:#x}, outside of the file")
TWICE = Kind("block-used-twice", "ERROR block {cluster} lies at {host:#x}, where another block lies as well")


def check(node: BlockTableFormat, say: Say) -> CheckResult:
    """Look at every entry of *node*'s table; *say* gets what is wrong with it. Takes a byte of memory for each block of the file."""
    result = CheckResult()
    unit, limit = node.allocation_unit, node.file.node.size
    result.total_clusters = node.entry_count
    seen = bytearray(limit // unit + 1)
    before = 0
    for index in range(-(-node.entry_count // node.per_page)):
        for slot, raw in enumerate(node.page(index).entries or ()):
            place = node.place(raw)
            if place <= ZEROED:
                continue
            number = index * node.per_page + slot
            result.allocated_clusters += 1
            if place & PACKED:
                result.compressed_clusters += 1
                continue
            if not node.data_from <= place < limit:
                result.corruptions += 1
                say(Finding(OUTSIDE, cluster=number, offset=place, owner="table", host=place))
                continue
            if seen[place // unit]:
                result.corruptions += 1
                say(Finding(TWICE, cluster=number, offset=place, owner="table", host=place))
            seen[place // unit] = 1
            if before and place != before:
                result.fragmented_clusters += 1
            before = place + node.stride
            result.image_end_offset = max(result.image_end_offset, place + unit)
    return result

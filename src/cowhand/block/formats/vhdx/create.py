"""Making VHDX files ([MS-VHDX] 2.2, 2.6): headers, log, metadata and table, in this order, then the blocks."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.formats.vhdx import layout
from cowhand.block.formats.vhdx.layout import KIB, MIB, Header, seal
from cowhand.core import clock
from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

_CREATOR = "cowhand"
_SECTOR = 512
#: Disks larger than this many bytes get blocks of that many; QEMU's choice.
_BLOCKS = ((32 << 40, 64 * MIB), (100 << 30, 32 * MIB), (1 << 30, 16 * MIB), (-1, 8 * MIB))


def check(size: int, options: Mapping[str, Any]) -> None:
    """Raise InvalidArgument for what cannot be made."""
    block, length = options.get("block_size") or _automatic(size), options.get("log_size") or MIB
    kind = options.get("subformat") or "dynamic"
    if size > layout.MAX_SIZE:
        raise InvalidArgument("Image size too large; max of 64TB")
    if length >= 1 << 32:
        raise InvalidArgument("Log size must be smaller than 4 GB")
    if length % MIB:
        raise InvalidArgument("Log size must be a multiple of 1 MB")
    if length > layout.MAX_LOG:
        raise InvalidArgument(f"a log has at most {layout.MAX_LOG} bytes here, not {length}")
    if kind not in ("dynamic", "fixed"):
        raise InvalidArgument(f"Invalid parameter '{kind}'", hint="Known sub-formats: dynamic, fixed.")
    if block % MIB:
        raise InvalidArgument("Block size must be a multiple of 1 MB")
    if block & (block - 1):
        raise InvalidArgument("Block size must be a power of two")
    if block > layout.MAX_BLOCK:
        raise InvalidArgument(f"Block size must not exceed {layout.MAX_BLOCK}")


def _automatic(size: int) -> int:
    return next(block for limit, block in _BLOCKS if size > limit)


def create(file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
    """Make *file* a VHDX of *size* bytes."""
    check(size, options)
    block, length = options.get("block_size") or _automatic(size), options.get("log_size") or MIB
    fixed = options.get("subformat") == "fixed"
    chunk = layout.CHUNK * _SECTOR // block
    blocks = -(-size // block)
    entries = blocks + (blocks - 1) // chunk if blocks else 0
    metadata_at = MIB + length
    bat_at, bat_size = metadata_at + MIB, max(1, -(-entries * 8 // MIB)) * MIB
    data_at = bat_at + bat_size
    make_empty(file, data_at + (blocks * block if fixed else 0))
    identifier = layout.IDENTIFIER + _CREATOR.encode("utf-16-le")
    regions = bytearray(layout.TABLE_SIZE)
    layout.REGIONS.pack_into(regions, 0, b"regi", 0, 2)
    for number, (identity, at, count) in enumerate(
        ((layout.BAT_REGION, bat_at, bat_size), (layout.METADATA_REGION, metadata_at, MIB))
    ):
        layout.REGION.pack_into(regions, layout.REGIONS.size + number * layout.REGION.size, identity, at, count, 1)
    table = seal(regions)
    if fixed or options.get("block_state_zero", True):
        _write_table(file, bat_at, blocks, chunk, data_at if fixed else None, block)
    file.write(metadata_at, (_metadata(size, block, fixed),))
    for at in layout.REGION_TABLES:
        file.write(at, (table,))
    header = Header(0, 0, clock.random_bytes(16), clock.random_bytes(16), bytes(16), length, MIB)
    for sequence, at in enumerate(layout.HEADERS):
        file.write(at, (header._replace(at=at, sequence=sequence + 1).packed(),))
    file.write(0, (identifier.ljust(KIB, b"\0"),))
    file.flush()


def _write_table(file: BlockNode, at: int, blocks: int, chunk: int, data: int | None, block: int) -> None:
    """Write the entries of all *blocks*: present, one after the other from *data* on, or zeroes."""
    for first in range(0, blocks, chunk):
        count = min(chunk, blocks - first)
        if data is None:
            words = array("Q", [layout.ZERO]) * count
        else:
            begin = data + first * block | layout.PRESENT
            words = array("Q", range(begin, begin + count * block, block))
        file.write(at + (first + first // chunk) * 8, (words.tobytes(),))


def _metadata(size: int, block: int, fixed: bool) -> bytes:
    """Return the metadata region's first 128 KiB: the table, and the items."""
    items = (
        (
            layout.FILE_PARAMETERS,
            layout.IS_REQUIRED,
            block.to_bytes(4, "little") + (layout.LEAVE_ALLOCATED if fixed else 0).to_bytes(4, "little"),
        ),
        (layout.DISK_SIZE, layout.IS_REQUIRED | layout.IS_VIRTUAL_DISK, size.to_bytes(8, "little")),
        (layout.DISK_ID, layout.IS_REQUIRED | layout.IS_VIRTUAL_DISK, clock.random_bytes(16)),
        (layout.LOGICAL_SECTOR, layout.IS_REQUIRED | layout.IS_VIRTUAL_DISK, _SECTOR.to_bytes(4, "little")),
        (layout.PHYSICAL_SECTOR, layout.IS_REQUIRED | layout.IS_VIRTUAL_DISK, (4096).to_bytes(4, "little")),
    )
    out = bytearray(2 * layout.TABLE_SIZE)
    layout.METADATA.pack_into(out, 0, b"metadata", len(items))
    offset = layout.TABLE_SIZE
    for number, (identity, flags, value) in enumerate(items):
        layout.ITEM.pack_into(
            out, layout.METADATA.size + number * layout.ITEM.size, identity, offset, len(value), flags
        )
        out[offset : offset + len(value)] = value
        offset += len(value)
    return bytes(out)

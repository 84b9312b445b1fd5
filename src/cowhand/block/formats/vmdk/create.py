"""Making VMware disks ("Virtual Disk Format 5.0")."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.formats.vmdk.layout import (
    FLAG_LINE_CHECK,
    FLAG_REDUNDANT,
    FLAG_ZERO_GRAIN,
    MAX_TABLE,
    NO_PARENT,
    SECTOR,
    SPARSE,
    SPARSE_MAGIC,
    TRANSFER_CHECK,
)
from cowhand.core import clock
from cowhand.core.errors import InvalidArgument, NotSupported
from cowhand.core.unfinished import final_name

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

GRAIN = 128  #: sectors
_DESCRIPTOR_SECTORS = 20
_ADAPTERS = ("ide", "lsilogic", "buslogic", "legacyESX")
_SUBFORMATS = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized")
#: The grains of one extent are named by sectors in 32 bits.
MAX_SIZE = (1 << 32) * SECTOR - (1 << 30)
_TEXT = """\
# Disk DescriptorFile
version=1
CID={cid:08x}
parentCID={parent:08x}
createType="{kind}"
{hint}
# Extent description
{extents}
# The Disk Data Base
#DDB

ddb.virtualHWVersion = "{hardware}"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "{heads}"
ddb.geometry.sectors = "63"
ddb.adapterType = "{adapter}"
ddb.toolsVersion = "{tools}"
"""


def check(size: int, options: Mapping[str, Any]) -> None:
    """Raise InvalidArgument or NotSupported for what cannot be made."""
    adapter, kind = options.get("adapter_type") or "ide", options.get("subformat") or "monolithicSparse"
    if adapter not in _ADAPTERS:
        raise InvalidArgument(f"Unknown adapter type: {adapter}", qemu=f"Unknown adapter type: {adapter}")
    if kind not in _SUBFORMATS:
        raise InvalidArgument(f"Invalid parameter '{kind}'", hint="Known sub-formats: " + ", ".join(_SUBFORMATS))
    if kind != "monolithicSparse":
        raise NotSupported(f"disks of the sub-format {kind} are read, and not made yet", path=None)
    if options.get("compat6") and options.get("hwversion") not in (None, "undefined"):
        raise InvalidArgument("compat6 cannot be enabled with hwversion set")
    if size > MAX_SIZE:
        raise InvalidArgument(f"an extent has at most {MAX_SIZE} bytes, not {size}", qemu="The image size is too large")
    if options.get("backing_fmt") not in (None, "vmdk"):
        raise InvalidArgument(f"Invalid backing file format: {options['backing_fmt']}. Must be vmdk")


def create(file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
    """Make *file* a monolithicSparse disk of *size* bytes: header, descriptor, two directories with all their tables, then grains."""
    check(size, options)
    sectors = size // SECTOR
    name = final_name(file.filename).rsplit("/", 1)[-1]
    tables = -(-sectors // (GRAIN * MAX_TABLE))
    table_sectors = MAX_TABLE * 4 // SECTOR
    directory_sectors = -(-tables * 4 // SECTOR)
    second = 1 + _DESCRIPTOR_SECTORS
    first = second + directory_sectors + tables * table_sectors
    overhead = -(-(first + directory_sectors + tables * table_sectors) // GRAIN) * GRAIN
    zeroed = bool(options.get("zeroed_grain"))
    header = SPARSE.pack(
        SPARSE_MAGIC, 2 if zeroed else 1, FLAG_LINE_CHECK | FLAG_REDUNDANT | (FLAG_ZERO_GRAIN if zeroed else 0), sectors, GRAIN, 1,
        _DESCRIPTOR_SECTORS, MAX_TABLE, second, first, overhead, 0, TRANSFER_CHECK, 0,
    )  # fmt: skip
    text = _text(sectors, options, f'RW {sectors} SPARSE "{name}"')
    make_empty(file, overhead * SECTOR)
    for place in (second, first):
        begin = place + directory_sectors
        words = array("I", range(begin, begin + tables * table_sectors, table_sectors))
        file.write(place * SECTOR, (words.tobytes().ljust(directory_sectors * SECTOR, b"\0"),))
    file.write(SECTOR, (text,))
    file.write(0, (header.ljust(SECTOR, b"\0"),))
    file.flush()


def _text(sectors: int, options: Mapping[str, Any], extents: str) -> bytes:
    adapter = options.get("adapter_type") or "ide"
    heads = 16 if adapter == "ide" else 255
    hardware = options.get("hwversion") or "undefined"
    if hardware == "undefined":
        hardware = "6" if options.get("compat6") else "4"
    backing = options.get("backing_file")
    text = _TEXT.format(
        cid=int.from_bytes(clock.random_bytes(4), "little") & 0xFFFFFFFE,
        parent=_cid_of(options) if backing else NO_PARENT,
        kind=options.get("subformat") or "monolithicSparse",
        hint=f'parentFileNameHint="{backing}"\n' if backing else "",
        extents=extents,
        hardware=hardware,
        cylinders=min(sectors // (63 * heads), 16383 if adapter == "ide" else 0xFFFFFFFF),
        heads=heads,
        adapter=adapter,
        tools=options.get("toolsversion") or "2147483647",
    ).encode("utf-8", "surrogateescape")
    if len(text) > _DESCRIPTOR_SECTORS * SECTOR:
        raise InvalidArgument("the descriptor does not fit: the name of the base is too long")
    return text


def _cid_of(options: Mapping[str, Any]) -> int:
    """Return the id of the parent's content, which a creation with a parent is given beside."""
    cid = options.get("parent_cid")
    if cid is None:
        raise NotSupported("VMware disks over a parent are read, and not made yet")
    return int(cid)

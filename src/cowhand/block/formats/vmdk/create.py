"""Making VMware disks ("Virtual Disk Format 5.0")."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.formats.vmdk.layout import (
    FLAG_LINE_CHECK,
    FLAG_REDUNDANT,
    FLAG_ZERO_GRAIN,
    MAX_DIRECTORY,
    MAX_TABLE,
    NO_PARENT,
    SECTOR,
    SPARSE,
    SPARSE_MAGIC,
    TRANSFER_CHECK,
)
from cowhand.core import clock
from cowhand.core.errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

GRAIN = 128  #: sectors
_DESCRIPTOR_SECTORS = 20
_ADAPTERS = ("ide", "lsilogic", "buslogic", "legacyESX")
_SUBFORMATS = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized")
_FLAT, _SPLIT = ("monolithicFlat", "twoGbMaxExtentFlat"), ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat")
_PIECE = 1 << 31  #: bytes of an extent of those that are split
#: What the largest directory that is read covers. The grains that are stored are named by sectors in 32 bits.
MAX_SIZE = MAX_DIRECTORY * MAX_TABLE * GRAIN * SECTOR
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
    adapter, kind = options.get("adapter_type") or "ide", _kind(options)
    if adapter not in _ADAPTERS:
        raise InvalidArgument(f"Unknown adapter type: {adapter}")
    if kind not in _SUBFORMATS:
        raise InvalidArgument(f"Invalid parameter '{kind}'", hint="Known sub-formats: " + ", ".join(_SUBFORMATS))
    if kind == "streamOptimized":
        raise NotSupported("disks of the sub-format streamOptimized are read, and not made yet")
    if options.get("compat6") and options.get("hwversion") not in (None, "undefined"):
        raise InvalidArgument("compat6 cannot be enabled with hwversion set")
    if kind in _FLAT and options.get("backing_file"):
        raise NotSupported("Flat image can't have backing file")
    if kind in _FLAT and options.get("zeroed_grain"):
        raise NotSupported("Flat image can't enable zeroed grain")
    if kind == "monolithicSparse" and size > MAX_SIZE:
        raise InvalidArgument(f"an extent has at most {MAX_SIZE} bytes, not {size}", qemu="The image size is too large")
    if options.get("backing_fmt") not in (None, "vmdk"):
        raise InvalidArgument(f"Invalid backing file format: {options['backing_fmt']}. Must be vmdk")


def _kind(options: Mapping[str, Any]) -> str:
    return str(options.get("subformat") or "monolithicSparse")


def _pieces(size: int, options: Mapping[str, Any]) -> list[int]:
    """Return the sizes of the extents, in bytes."""
    if _kind(options) not in _SPLIT:
        return [size]
    return [min(_PIECE, size - begin) for begin in range(0, size, _PIECE)] or [0]


def extent_names(filename: str, size: int, options: Mapping[str, Any]) -> list[str]:
    """Return the names of the files of extents; none where the image is its own only extent."""
    kind = _kind(options)
    base, dot, ending = filename.rpartition(".")
    if not dot or "/" in ending:
        base, ending = filename, "vmdk"
    if kind == "monolithicFlat":
        return [f"{base}-flat.{ending}"]
    letter = {"twoGbMaxExtentSparse": "s", "twoGbMaxExtentFlat": "f"}.get(kind)
    if letter is None:
        return []
    return [f"{base}-{letter}{number:03}.{ending}" for number in range(1, len(_pieces(size, options)) + 1)]


def create_extent(file: BlockNode, number: int, size: int, options: Mapping[str, Any]) -> None:
    """Make *file* extent *number* of a disk of *size* bytes."""
    length = _pieces(size, options)[number]
    if _kind(options) in _FLAT:
        make_empty(file, length)
    else:
        _sparse(file, length // SECTOR, options, b"")
    file.flush()


def create(file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
    """Make *file* a disk of *size* bytes: the one extent with its descriptor inside, or the descriptor of extents that are there already."""
    check(size, options)
    name = str(options.get("image_name") or file.filename)
    names = [os.path.basename(known) for known in extent_names(name, size, options)]
    if not names:
        sectors = size // SECTOR
        text = _text(size, options, [f'RW {sectors} SPARSE "{os.path.basename(name)}"'])
        if len(text) > _DESCRIPTOR_SECTORS * SECTOR:
            raise InvalidArgument("the descriptor does not fit: the name of the base is too long")
        _sparse(file, sectors, options, text)
    else:
        kind, tail = ("FLAT", " 0") if _kind(options) in _FLAT else ("SPARSE", "")
        pieces = zip(_pieces(size, options), names, strict=True)
        text = _text(size, options, [f'RW {length // SECTOR} {kind} "{extent}"{tail}' for length, extent in pieces])
        make_empty(file)
        file.write(0, (text,))
    file.flush()


def _sparse(file: BlockNode, sectors: int, options: Mapping[str, Any], text: bytes) -> None:
    """Make *file* an extent that stores nothing: header, descriptor, two directories with all their tables, then grains."""
    tables = -(-sectors // (GRAIN * MAX_TABLE))
    table_sectors = MAX_TABLE * 4 // SECTOR
    directory_sectors = -(-tables * 4 // SECTOR)
    second = 1 + _DESCRIPTOR_SECTORS
    first = second + directory_sectors + tables * table_sectors
    overhead = -(-(first + directory_sectors + tables * table_sectors) // GRAIN) * GRAIN
    zeroed = bool(options.get("zeroed_grain"))
    header = SPARSE.pack(
        SPARSE_MAGIC, 2 if zeroed else 1, FLAG_LINE_CHECK | FLAG_REDUNDANT | (FLAG_ZERO_GRAIN if zeroed else 0), sectors, GRAIN,
        1 if text else 0, _DESCRIPTOR_SECTORS if text else 0, MAX_TABLE, second, first, overhead, 0, TRANSFER_CHECK, 0,
    )  # fmt: skip
    make_empty(file, overhead * SECTOR)
    for place in (second, first):
        begin = place + directory_sectors
        words = array("I", range(begin, begin + tables * table_sectors, table_sectors))
        file.write(place * SECTOR, (words.tobytes().ljust(directory_sectors * SECTOR, b"\0"),))
    if text:
        file.write(SECTOR, (text,))
    file.write(0, (header.ljust(SECTOR, b"\0"),))


def _text(size: int, options: Mapping[str, Any], extents: list[str]) -> bytes:
    adapter = options.get("adapter_type") or "ide"
    heads = 16 if adapter == "ide" else 255
    hardware = options.get("hwversion") or "undefined"
    if hardware == "undefined":
        hardware = "6" if options.get("compat6") else "4"
    backing = options.get("backing_file")
    parent = options.get("parent_cid") if backing else NO_PARENT
    if parent is None:
        raise InvalidArgument("a disk over a parent records which content of it is meant, so the parent must be there")
    return _TEXT.format(
        cid=int.from_bytes(clock.random_bytes(4), "little") & 0xFFFFFFFE,
        parent=parent,
        kind=_kind(options),
        hint=f'parentFileNameHint="{backing}"\n' if backing else "",
        extents="\n".join(extents) + "\n",
        hardware=hardware,
        cylinders=size // (63 * heads * SECTOR),
        heads=heads,
        adapter=adapter,
        tools=options.get("toolsversion") or "2147483647",
    ).encode("utf-8", "surrogateescape")

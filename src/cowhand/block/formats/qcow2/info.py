"""What ``info`` tells of a qcow2 image beyond what every image has (QEMU ``qapi/block-core.json``, ImageInfoSpecificQCow2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2.ondisk import layout as L

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def describe(node: Qcow2Node) -> dict[str, Any]:
    """Return QEMU's names and values, in QEMU's order; bitmaps as :func:`cowhand.block.formats.qcow2.bitmap.directory.list_bitmaps` gives them."""
    header = node.header
    out: dict[str, Any] = {"compat": "0.10" if header.version == 2 else "1.1"}
    out["compression-type"] = "zstd" if header.compression_type == L.COMPRESSION_ZSTD else "zlib"
    out["refcount-bits"] = header.refcount_bits
    if node.encryption is not None:
        out["encrypt"] = node.encryption.describe()
    if header.version >= 3:
        out["lazy-refcounts"] = bool(header.compatible & L.COMPAT_LAZY_REFCOUNTS)
        if node.external:
            from cowhand.block.formats.qcow2.cluster.data_file import data_file_name

            if header.find(L.EXT_DATA_FILE) is not None:
                out["data-file"] = data_file_name(header)
            out["data-file-raw"] = node.raw_data
        out["corrupt"] = bool(header.incompatible & L.INCOMPAT_CORRUPT)
        out["extended-l2"] = bool(header.incompatible & L.INCOMPAT_EXTENDED_L2)
        if header.find(L.EXT_BITMAPS) is not None:
            from cowhand.block.formats.qcow2.bitmap.directory import list_bitmaps

            bitmaps = list_bitmaps(node)
            if bitmaps:
                out["bitmaps"] = bitmaps
    return out

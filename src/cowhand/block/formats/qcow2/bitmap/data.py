"""Tables and content of persistent bitmaps (QEMU ``docs/interop/qcow2``, "Bitmap table", "Bitmap data")."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import InvalidFormat, UnsupportedFeature

if TYPE_CHECKING:
    from array import array

    from cowhand.bitmaps.bitmap import Bitmap
    from cowhand.block.formats.qcow2.bitmap.directory import StoredBitmap
    from cowhand.block.formats.qcow2.driver import Qcow2Node

TABLE_RESERVED = 0xFF000000000001FE  #: specified
ALL_ONES = 1
#: Bytes of tables and content that one open image reads into memory: two bitmaps of the largest kind.
MAX_LOADED_BYTES = 160 << 20


def wrong_table_entry(word: int, cluster_size: int, end: int) -> bool:
    """Tell whether *word* cannot be an entry of a bitmap table in a file of *end* bytes."""
    offset = word & L.BITMAP_TABLE_OFFSET_MASK
    if word & TABLE_RESERVED:
        return True
    return bool(offset) and bool(word & ALL_ONES or offset % cluster_size or offset >= end)


def read_table(node: Qcow2Node, entry: StoredBitmap) -> array[int]:
    """Return the words of *entry*'s table, each one checked. Raises InvalidFormat, IOFailed."""
    from cowhand.block.formats.qcow2.ondisk.l2_entries import words_of

    data = bytearray(entry.entries * L.ENTRY_SIZE)
    node.file.read_into(entry.table, data)
    words = words_of(bytes(data))
    end = node.file.node.size
    for word in set(words):
        if wrong_table_entry(word, node.cluster_size, end):
            raise InvalidFormat(
                f"the table of bitmap '{entry.text}' has the entry {word:#x}, which is not possible",
                qemu=f"Could not read bitmap_table table from image for bitmap '{entry.text}': {os.strerror(22)}",
                path=node.filename, offset=entry.table, hint="A repair drops the bitmap.",
            )  # fmt: skip
    return words


def read_content(node: Qcow2Node, entry: StoredBitmap, bits: Bitmap) -> None:
    """Set in *bits* what *entry* has stored. Raises InvalidFormat, IOFailed, UnsupportedFeature when it would take too much memory."""
    from cowhand.block.formats.qcow2.bitmap.directory import needed_entries

    words = read_table(node, entry)
    if len(words) != needed_entries(node, bits.size, entry.granularity_bits):
        raise InvalidFormat(
            f"the table of bitmap '{entry.text}' has {len(words)} entries, which does not fit the disk",
            qemu=f"Could not read bitmap '{entry.text}' from image: {os.strerror(22)}", path=node.filename, offset=entry.table,
        )  # fmt: skip
    size = node.cluster_size
    node.bitmap_bytes_loaded += len(words) * L.ENTRY_SIZE + sum(word > ALL_ONES for word in words) * size
    if node.bitmap_bytes_loaded > MAX_LOADED_BYTES:
        raise UnsupportedFeature(
            f"the content of the image's bitmaps takes more than {MAX_LOADED_BYTES >> 20} MiB", path=node.filename,
            hint="Remove bitmaps that nobody needs.", errno=27,
        )  # fmt: skip
    for index, word in enumerate(words):
        data = cluster_content(node, word)
        if data is not None:
            bits.set_bytes(index * size, data)


def cluster_content(node: Qcow2Node, word: int) -> bytes | None:
    """Return the stored bytes that the table entry *word* stands for; None for zeroes."""
    if not word:
        return None
    size = node.cluster_size
    if word == ALL_ONES:
        return b"\xff" * size
    # The last cluster of a file need not be there whole; what is behind the end reads as zeroes.
    data = bytearray(size)
    node.file.read_into(word & L.BITMAP_TABLE_OFFSET_MASK, data)
    return bytes(data)


def encode_table(words: Sequence[int]) -> bytes:
    """Return the table on disk."""
    return b"".join(map(L.U64.pack, words))

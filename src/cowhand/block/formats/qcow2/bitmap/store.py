"""Keeping the persistent bitmaps of a qcow2 image while it is written (QEMU ``docs/interop/qcow2``, "Bitmaps").

Before the first write the bitmaps that follow writes are marked as in use, so that after a crash nobody trusts them. On closing, their content
goes to new clusters; all is made stable; one switch in the header makes the new directory the image's; what only the old one named is freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.bitmap import data as bitmapdata
from cowhand.block.formats.qcow2.bitmap.directory import (
    AUTO,
    GRANULARITY_BITS,
    IN_USE,
    MAX_ANEW_BYTES,
    MAX_ANEW_ENTRIES,
    MAX_BITMAP_BYTES,
    MAX_DIRECTORY_BYTES,
    MAX_NAME,
    MAX_RECORDING,
    StoredBitmap,
    make_live,
    needed_entries,
    serialized_bytes,
)
from cowhand.block.formats.qcow2.bitmap.header_switch import switch_directory
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported

if TYPE_CHECKING:
    from cowhand.bitmaps.named import DirtyBitmap
    from cowhand.block.formats.qcow2.driver import Qcow2Node

_FLAGS_IN_ENTRY = 12
#: Flags in the directory that are written one by one.
_FEW_FLAGS = 64


def begin(node: Qcow2Node) -> None:
    """Say in the file that the bitmaps which follow writes are out of date from now on. Before the first write; the lock is held."""
    directory = node.bitmap_directory
    if directory.outdated:
        # Nobody needs to be told again. (In version 2 the extension is where no field says that it does not count.)
        if node.header.version >= 3:
            switch_directory(node, None)
            directory.outdated = False
        return
    if not directory.readable:
        # Nothing can be said of a single bitmap, and none may be trusted after this.
        node.set_autoclear(node.header.autoclear & ~L.AUTOCLEAR_BITMAPS)
        return
    claim(node, [entry for entry in directory if entry.flags & AUTO])
    if directory.broken or directory.crowded:
        for entry in directory:
            if entry.live is not None and entry.in_use:
                entry.live.inconsistent = True


def hold(node: Qcow2Node) -> None:
    """Say in the file, now, that all bitmaps are out of date as long as the image is open."""
    entries = [entry for entry in node.bitmap_directory if entry.live is not None and not entry.in_use]
    if not entries and not node.bitmap_directory.outdated:
        return
    node.check_writable()
    with node.exclusive():
        claim(node, entries)


def claim(node: Qcow2Node, entries: Iterable[StoredBitmap]) -> None:
    """Mark *entries* as in use, stably. A flag lies in one sector, so each entry is right in every state that the medium may have."""
    entries = [entry for entry in entries if not entry.in_use]
    stored = [entry for entry in entries if entry.at >= 0]
    directory = node.bitmap_directory
    if len(stored) > _FEW_FLAGS:
        # The directory as it is, but for these bits. Sectors are written whole, so each flag is the old or the new one.
        data = bytearray(directory.size)
        node.file.read_into(directory.offset, data)
        for entry in stored:
            L.U32.pack_into(data, entry.at + _FLAGS_IN_ENTRY, entry.flags | IN_USE)
        node.write_metadata(directory.offset, data)
    else:
        for entry in stored:
            node.write_metadata(directory.offset + entry.at + _FLAGS_IN_ENTRY, L.U32.pack(entry.flags | IN_USE))
    if stored:
        node.flush_file()
    for entry in entries:
        entry.flags |= IN_USE


def store(node: Qcow2Node) -> None:
    """Write the bitmaps that changed, and the directory, as far as there is something to write. Takes the locks; no requests are in flight."""
    directory = node.bitmap_directory
    if directory.broken or not node.writable:
        return
    if not directory.changed and not any(_pending(entry) for entry in directory):
        return
    directory.anew = directory.anew and _can_be_anew(node)
    for entry in directory:
        if _rewritten(node, entry) and entry.live is not None:
            _ = entry.live.bits  # read what is not in memory yet, while no lock is held
    node.flush()
    with node.operation, node.exclusive():
        _store(node)


def _pending(entry: StoredBitmap) -> bool:
    """Tell whether what is stored of *entry* is older than what is in memory."""
    return entry.live is not None and not entry.live.inconsistent and (entry.in_use or entry.at < 0)


def _unchanged(entry: StoredBitmap) -> bool:
    """Tell whether what is stored of *entry* is its content still: nothing was read of it, and nothing recorded."""
    return entry.at >= 0 and entry.live is not None and entry.live.partial and not entry.live.recent


def _rewritten(node: Qcow2Node, entry: StoredBitmap) -> bool:
    """Tell whether the content of *entry* goes to new clusters when the directory does."""
    if node.bitmap_directory.anew:
        return entry.live is not None and not entry.live.inconsistent
    return _pending(entry) and not _unchanged(entry)


def _can_be_anew(node: Qcow2Node) -> bool:
    """Tell whether all bitmaps are few and small enough to write them again when one has changed."""
    directory = node.bitmap_directory
    if len(directory) > MAX_RECORDING or sum(entry.entries for entry in directory) > MAX_ANEW_ENTRIES:
        return False
    stored = (entry for entry in directory if entry.at >= 0 and entry.live is not None and not entry.live.inconsistent)
    clusters = sum(sum(map(bool, bitmapdata.read_table(node, entry))) for entry in stored)
    return clusters * node.cluster_size <= MAX_ANEW_BYTES


def _store(node: Qcow2Node, *, content: bool = True) -> None:
    """Write a new directory, and the bitmaps that changed; without *content* it names what is stored already, and nothing else."""
    directory = node.bitmap_directory
    node.write_back.run(locked=True)
    taken: list[tuple[int, int]] = []
    replaced = list(directory.removed)
    try:
        fresh = directory.entries
        if content:
            wanted = [_pending(entry) or _rewritten(node, entry) for entry in fresh]
            fresh = [_stored_anew(node, e, taken) if new else e for e, new in zip(fresh, wanted, strict=True)]
        named = [entry for entry in fresh if content or entry.at >= 0]
        data = b"".join(entry.encode() for entry in named)
        place = _put(node, data, taken) if data else 0
        # The counts, and all that was just written, before the header names any of it.
        node.write_back.run(locked=True)
        node.flush_file()
        switch_directory(node, L.BITMAP_EXTENSION.pack(len(named), 0, len(data), place) if data else None)
    except CowhandError:
        if node.poison is None:
            for first, count in taken:
                node.allocator.untake(first, count)
            node.changed = True
        raise
    replaced += [old for old, new in zip(directory.entries, fresh, strict=True) if old.table not in (0, new.table)]
    size = node.cluster_size
    if directory.readable and directory.size:
        _free(node, directory.offset // size, -(-directory.size // size))
    for old in replaced:
        _free_bitmap(node, old)
    directory.entries, directory.removed, directory.changed = fresh, [], not content
    directory.present = directory.readable = bool(data)
    directory.offset, directory.size = place, len(data)
    at = 0
    for entry in named:
        entry.at = at
        at += len(entry.encode())
    node.rebuild_metadata_map()
    node.write_back.run(locked=True)


def _put(node: Qcow2Node, data: bytes, taken: list[tuple[int, int]]) -> int:
    """Write *data* to new clusters; return its offset."""
    clusters = -(-len(data) // node.cluster_size)
    first = node.allocator.take(clusters)
    taken.append((first, clusters))
    # The file may end inside the last of them, as in QEMU.
    node.write_metadata(first * node.cluster_size, data)
    return first * node.cluster_size


def _stored_anew(node: Qcow2Node, entry: StoredBitmap, taken: list[tuple[int, int]]) -> StoredBitmap:
    """Write all of *entry*'s bitmap to new clusters, if it has changed; return the entry that names it."""
    assert entry.live is not None
    new = StoredBitmap(entry.name, entry.granularity_bits)
    new.flags = entry.flags & ~(IN_USE | AUTO) | (AUTO if entry.live.enabled else 0)
    new.extra, new.live, new.at = entry.extra, entry.live, entry.at
    if not _rewritten(node, entry):
        new.table, new.entries = entry.table, entry.entries
        return new
    bits, size = entry.live.bits, node.cluster_size
    words = []
    full = b"\xff" * size
    for index in range(needed_entries(node, bits.size, entry.granularity_bits)):
        data = bits.get_bytes(index * size, size)
        if data == full and not node.bitmap_directory.anew:  # QEMU reads this word, and does not write it
            words.append(bitmapdata.ALL_ONES)
        else:
            words.append(_put(node, data, taken) if any(data) else 0)
    new.table, new.entries = _put(node, bitmapdata.encode_table(words), taken), len(words)
    return new


def _free(node: Qcow2Node, first: int, clusters: int) -> None:
    try:
        node.refcounts.change(first, clusters, -1)
    except CowhandError as error:
        diagnostics.report(f"qcow2_free_clusters failed: {error.qemu()}")


def _free_bitmap(node: Qcow2Node, entry: StoredBitmap) -> None:
    """Free the table and the content of a bitmap that no directory names any more; what cannot be read leaks."""
    size = node.cluster_size
    try:
        words = bitmapdata.read_table(node, entry)
    except CowhandError as error:
        diagnostics.report(f"the clusters of bitmap '{entry.text}' are leaked: {error.qemu()}")
        return
    for word in words:
        if word & L.BITMAP_TABLE_OFFSET_MASK:
            _free_own(node, (word & L.BITMAP_TABLE_OFFSET_MASK) // size, 1)
    _free_own(node, entry.table // size, -(-entry.entries * L.ENTRY_SIZE // size))


def _free_own(node: Qcow2Node, first: int, clusters: int) -> None:
    """Free what a bitmap occupies, but for what is metadata of the image: a damaged or hostile bitmap may name it."""
    hit = node.metadata.hit(first, first + clusters - 1)
    if hit is None:
        _free(node, first, clusters)
    else:
        diagnostics.report(f"a bitmap names metadata at {hit * node.cluster_size:#x}, which is not freed")


# -- bitmaps come, change and go


def possible(node: Qcow2Node) -> bool:
    """Tell whether the image can keep bitmaps."""
    return node.header.version >= 3


def broken_reason(node: Qcow2Node) -> CowhandError | None:
    """Return why the directory cannot be relied on, None where it is sound."""
    try:
        node.bitmap_directory.check_sound()
    except CowhandError as error:
        return error
    return None


def check_constraints(node: Qcow2Node, name: str, granularity: int, size: int) -> None:
    """Raise InvalidArgument when the image cannot keep such a bitmap of a disk of *size* bytes."""
    bits = granularity.bit_length() - 1
    if not size:
        raise InvalidArgument(
            "A disk of 0 bytes has no bitmaps: what is stored of them would be an image that cannot be opened",
            qemu="Bitmaps of an empty disk cannot be stored",
            hint="Make the disk larger first, or remove its bitmaps.",
        )
    if bits > GRANULARITY_BITS[-1]:
        raise InvalidArgument(f"Granularity exceeds maximum ({1 << GRANULARITY_BITS[-1]} bytes)")
    if serialized_bytes(size, bits) > MAX_BITMAP_BYTES:
        raise InvalidArgument("Too much space will be occupied by the bitmap. Use larger granularity")
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise InvalidArgument(f"Name length exceeds maximum ({MAX_NAME} characters)")


def check_new(node: Qcow2Node, name: str, granularity: int) -> StoredBitmap:
    """Return the entry of a new bitmap. Raises InvalidArgument, NotSupported in QEMU's words where the image cannot keep it."""
    directory = node.bitmap_directory
    try:
        if node.header.version < 3:
            raise NotSupported("Cannot store dirty bitmaps in qcow2 v2 files", path=node.filename)
        check_constraints(node, name, granularity, node.header.size)
        directory.check_sound()
        entry = StoredBitmap(name.encode("utf-8", "surrogateescape"), granularity.bit_length() - 1)
        if len(directory) >= L.MAX_BITMAPS:
            raise InvalidArgument("Maximum number of persistent bitmaps is already reached")
        if len(directory.encode()) + len(entry.encode()) > MAX_DIRECTORY_BYTES:
            raise InvalidArgument("Not enough space in the bitmap directory")
    except CowhandError as error:
        raise error.within(qemu=f"Can't make bitmap '{name}' persistent in '{node.name}'") from None
    return entry


def add(node: Qcow2Node, name: str, granularity: int, *, enabled: bool) -> DirtyBitmap:
    """Add a bitmap that is kept in the image from the next closing on. Raises InvalidArgument, NotSupported in QEMU's words."""
    directory = node.bitmap_directory
    entry = check_new(node, name, granularity)
    node.check_writable()
    live = make_live(node, entry)
    live.replace(live.recent)  # nothing is stored of it
    live.enabled = enabled
    # As in QEMU: behind what is stored, and before what was added since.
    place = next((index for index, known in enumerate(directory.entries) if known.at < 0), len(directory))
    directory.entries.insert(place, entry)
    directory.changed = True
    return live


def touch(node: Qcow2Node, name: str) -> None:
    """Say in the file that the stored form of bitmap *name* is out of date from now on."""
    node.check_writable()
    entry = node.bitmap_directory.find(name.encode("utf-8", "surrogateescape"))
    if entry is not None:
        with node.exclusive():
            claim(node, [entry])


def remove(node: Qcow2Node, name: str) -> None:
    """Take bitmap *name* out of the directory, when it is next stored; as QEMU does, at once."""
    directory = node.bitmap_directory
    directory.check_sound()
    node.check_writable()
    entry = directory.find(name.encode("utf-8", "surrogateescape"))
    if entry is None:
        return
    if not directory.anew:
        # Until the directory is stored it names the bitmap, which follows no write any more: after a crash nobody may trust it.
        with node.exclusive():
            claim(node, [entry])
    directory.entries.remove(entry)
    if entry.table:
        directory.removed.append(entry)
    directory.changed = True
    if directory.anew and entry.at >= 0:
        # Where that fails, closing tries again.
        with node.operation, node.exclusive():
            _store(node, content=False)


def remove_all(node: Qcow2Node) -> None:
    """Drop every bitmap, at once: the image is becoming one that cannot keep them."""
    directory = node.bitmap_directory
    if not directory.entries:
        return
    directory.check_sound()
    node.check_writable()
    for entry in directory:
        if node.dirty_bitmaps is not None and node.dirty_bitmaps.get(entry.text) is not None:
            node.dirty_bitmaps.forget(entry.text)
    if node.dirty_bitmaps is not None:
        node.dirty_bitmaps.refresh()
    directory.removed += [entry for entry in directory if entry.table]
    directory.entries, directory.changed = [], True
    with node.exclusive():
        _store(node)


def mend(node: Qcow2Node, lost: Set[bytes]) -> None:
    """Write a directory with what is sound in this one, but for the bitmaps *lost*. The locks are held, and the counts are right.

    What the others occupied is not freed here: no count says that it is in use.
    """
    directory = node.bitmap_directory
    before = directory.problems, directory.entries
    directory.problems, directory.entries = [], [entry for entry in directory if entry.name not in lost]
    try:
        _store(node)
    except CowhandError:
        directory.problems, directory.entries = before
        raise
    directory.unusable = []
    known = node.dirty_bitmaps
    for entry in before[1]:
        if entry.live is None or known is None:
            continue
        if entry.name in lost:
            known.remove(entry.text)
        else:
            entry.live.read_only = not node.writable
    if known is None or directory.crowded:
        return
    known.refresh()
    if known.active and known.mark not in node.hooks:
        node.hooks = (*node.hooks, known.mark)  # who asked for the check binds the edges anew


def prepare_resize(node: Qcow2Node, size: int) -> None:
    """Get ready to follow the disk to *size*. Raises BitmapUnusable, InvalidArgument, with nothing changed, when a bitmap cannot."""
    directory = node.bitmap_directory
    if not directory.entries:
        return
    directory.check_sound()
    for entry in directory:
        if entry.live is None:
            raise NotSupported(
                "Cannot resize qcow2 with persistent bitmaps that were not loaded into memory", path=node.filename
            )
        entry.live.check()
        check_constraints(node, entry.text, 1 << entry.granularity_bits, size)
    for entry in directory:
        assert entry.live is not None
        _ = entry.live.bits
    with node.exclusive():
        claim(node, list(directory))

"""Dirty bitmaps of a disk: making, changing, merging and reading them. The same functions for every format that can keep them.

What changes a bitmap holds the requests of other users back meanwhile. A bitmap is stored in its image when the image is closed.
Texts are those of QEMU's ``block-dirty-bitmap-*`` commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cowhand.block.graph import graph
from cowhand.core.errors import BitmapNotFound, CowhandError, InvalidArgument, NotSupported, ReadOnly
from cowhand.core.units import parse_size

if TYPE_CHECKING:
    from cowhand.bitmaps.named import BitmapSet, DirtyBitmap
    from cowhand.block.disk import Disk
    from cowhand.block.node.node import BlockNode

_DEFAULT_GRANULARITY = 65536
_LEAST_DEFAULT = 4096


def _holder(disk: Disk) -> BlockNode:
    """Return the node that keeps *disk*'s bitmaps: the first below it that is no filter."""
    node = disk.root
    while node.is_filter and node.primary is not None:
        node = node.primary.node
    return node


def _known(node: BlockNode) -> BitmapSet:
    from cowhand.bitmaps.named import BitmapSet

    if node.dirty_bitmaps is None:
        node.dirty_bitmaps = BitmapSet()
    return node.dirty_bitmaps


def _changed(node: BlockNode) -> None:
    """Let writes reach the bitmaps exactly when one follows them."""
    known = _known(node)
    known.refresh()
    hooked = known.mark in node.hooks
    if known.active and not hooked:
        graph.add_hook(node, known.mark)
    elif hooked and not known.active:
        node.hooks = tuple(hook for hook in node.hooks if hook != known.mark)
        graph.rebind_parents(node)


def find_bitmap(disk: Disk, name: str) -> DirtyBitmap:
    """Return *disk*'s bitmap *name*. Raises BitmapNotFound."""
    node = _holder(disk)
    found = node.dirty_bitmaps.get(name) if node.dirty_bitmaps is not None else None
    if found is None:
        names = ", ".join(bitmap.name for bitmap in readable_bitmaps(disk)[:10])
        broken = broken_reason(disk)
        if broken is not None:
            raise broken.within(f"bitmap '{name}' is not among those that can be read")
        raise BitmapNotFound(
            f"Dirty bitmap '{name}' not found", path=disk.filename, hint=f"There are: {names}" if names else None
        )
    return found


def list_bitmaps(disk: Disk) -> list[DirtyBitmap]:
    """Return *disk*'s bitmaps, in their order; ``info()`` of one is what QEMU tells of it.

    Raises what :func:`broken_reason` returns where the image lists bitmaps and none of them can be read; of those that can, it may name more.
    """
    found = readable_bitmaps(disk)
    if not found:
        reason = broken_reason(disk)
        if reason is not None:
            raise reason
    return found


def readable_bitmaps(disk: Disk) -> list[DirtyBitmap]:
    """Return those of *disk*'s bitmaps that can be read: also none where all that the image says of them is broken."""
    return list(_holder(disk).dirty_bitmaps or ())


def can_keep(disk: Disk) -> bool:
    """Tell whether *disk*'s image can keep bitmaps: whether its format does, in its version."""
    node = _holder(disk)
    keeper = node.bitmap_keeper()
    return keeper is not None and keeper.possible(node)


def broken_reason(disk: Disk) -> CowhandError | None:
    """Return why the bitmaps that *disk*'s image lists may not be all, and cannot be changed; None where all is sound."""
    node = _holder(disk)
    keeper = node.bitmap_keeper()
    reason: CowhandError | None = keeper.broken_reason(node) if keeper is not None else None
    return reason


def hold_bitmaps(disk: Disk) -> None:
    """Say in the image, which is open for writing, that its bitmaps are in use from now on; otherwise that is said before the first write."""
    node = _holder(disk)
    keeper = node.bitmap_keeper()
    if keeper is not None and node.writable and not disk.read_only:
        with graph.quiesce(node):
            keeper.hold(node)


def check_new_bitmap(disk: Disk, name: str, granularity: int | None = None) -> int:
    """Raise what :func:`add_bitmap` would raise for a persistent bitmap, but that the disk is read-only; return the granularity in bytes."""
    node = _holder(disk)
    chosen = _new_granularity(node, name, granularity)
    _keeper(node).check_new(node, name, chosen)
    return chosen


def _new_granularity(node: BlockNode, name: str, granularity: int | None) -> int:
    if not name:
        raise InvalidArgument("Bitmap name cannot be empty")
    if granularity is None:
        granularity = max(_LEAST_DEFAULT, getattr(node, "cluster_size", 0) or _DEFAULT_GRANULARITY)
        granularity = min(granularity, _DEFAULT_GRANULARITY)
    elif granularity < 512 or granularity & (granularity - 1):
        raise InvalidArgument("Granularity must be power of 2 and at least 512")
    if node.dirty_bitmaps is not None and node.dirty_bitmaps.get(name) is not None:
        raise InvalidArgument(f"Bitmap already exists: {name}", hint="Choose another name, or remove that one.")
    return granularity


def add_bitmap(
    disk: Disk, name: str, *, granularity: int | str | None = None, persistent: bool = True, enabled: bool = True
) -> DirtyBitmap:
    """Make a bitmap that is clean; *granularity* in bytes (or text such as "64k"), the cluster size (at least 4 KiB) by default.

    Raises InvalidArgument, NotSupported where the image cannot keep it, ReadOnly.
    """
    from cowhand.bitmaps.bitmap import Bitmap
    from cowhand.bitmaps.named import DirtyBitmap

    node = _holder(disk)
    granularity = _new_granularity(node, name, None if granularity is None else parse_size(granularity))
    known = _known(node)
    with graph.quiesce(node):
        if persistent:
            _check_writable(disk)
            bitmap: DirtyBitmap = _keeper(node).add(node, name, granularity, enabled=enabled)
        else:
            bitmap = DirtyBitmap(name, Bitmap(node.size, granularity), enabled=enabled)
        known.add(bitmap)
        _changed(node)
    return bitmap


def _check_writable(disk: Disk) -> None:
    disk.check_open()
    if disk.read_only:
        raise ReadOnly(
            f"disk '{disk.name}' is open for reading only", path=disk.filename, hint="Open it with writable=True."
        )


def _keeper(node: BlockNode) -> Any:
    """Return what keeps bitmaps in *node*'s image. Raises NotSupported."""
    keeper = node.bitmap_keeper()
    if keeper is None:
        raise NotSupported(
            f"format '{node.driver}' has no dirty bitmaps",
            qemu=f"Can't store persistent bitmaps to {node.name}: Operation not supported",
            path=node.filename,
        )
    return keeper


def remove_bitmap(disk: Disk, name: str) -> None:
    """Forget a bitmap, an inconsistent one too. Raises BitmapNotFound, BitmapUnusable."""
    disk.check_open()
    node, bitmap = _holder(disk), find_bitmap(disk, name)
    with graph.quiesce(node):
        bitmap.check(inconsistent=True)
        if bitmap.persistent:
            _keeper(node).remove(node, name)
        _known(node).remove(name)
        _changed(node)


def _change(disk: Disk, name: str) -> tuple[BlockNode, DirtyBitmap]:
    """Return the bitmap that is about to be changed; what is stored of it is out of date from here on."""
    disk.check_open()
    node, bitmap = _holder(disk), find_bitmap(disk, name)
    bitmap.check()
    if bitmap.persistent:
        _keeper(node).touch(node, name)
    return node, bitmap


def clear_bitmap(disk: Disk, name: str) -> None:
    """Make all of a bitmap clean. Raises BitmapNotFound, BitmapUnusable."""
    with graph.quiesce(_holder(disk)):
        _, bitmap = _change(disk, name)
        bitmap.clear()


def enable_bitmap(disk: Disk, name: str, *, enabled: bool = True) -> None:
    """Let a bitmap follow writes, or stop it. Raises BitmapNotFound, BitmapUnusable."""
    with graph.quiesce(_holder(disk)):
        node, bitmap = _change(disk, name)
        bitmap.enabled = enabled
        _changed(node)


def merge_bitmap(disk: Disk, name: str, source: DirtyBitmap) -> None:
    """Make dirty what *source*, of a disk of the same size, has dirty; granularities may differ. Raises BitmapUnusable, InvalidArgument."""
    with graph.quiesce(_holder(disk)):
        target = find_bitmap(disk, name)
        target.check()
        source.check(read_only=True)
        if source.size != target.size:
            raise InvalidArgument(
                f"Bitmaps are of different sizes (destination size is {target.size}, source size is {source.size}) "
                "and can't be merged"
            )
        content = source.bits
        _change(disk, name)
        target.bits.merge(content)


def dirty_extents(disk: Disk, name: str) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what a bitmap has dirty, rising. Raises BitmapNotFound, BitmapUnusable, what reading the image raises."""
    bitmap = find_bitmap(disk, name)
    bitmap.check(busy=True, read_only=True)
    return bitmap.bits.extents()

"""Copying the persistent bitmaps of a disk to a copy of it. What the copy of the data itself writes is not recorded in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cowhand.core.errors import BitmapUnusable, CowhandError, NotSupported
from cowhand.image import bitmaps

if TYPE_CHECKING:
    from cowhand.bitmaps.named import DirtyBitmap
    from cowhand.block.disk import Disk

Warn = Callable[[str], None]


def check_bitmaps(source: Disk, *, skip_broken: bool = False) -> None:
    """Raise NotSupported where *source*'s format keeps no bitmaps, BitmapUnusable where one is inconsistent and would not be skipped."""
    if not bitmaps.can_keep(source):
        raise NotSupported(
            f"'{source.filename}' is of a format without dirty bitmaps",
            qemu="Source lacks bitmap support",
            path=source.filename,
        )
    if skip_broken:
        return
    for bitmap in _persistent(source):
        if bitmap.inconsistent:
            raise BitmapUnusable(
                f"bitmap '{bitmap.name}' is inconsistent and cannot be copied",
                qemu=f"Cannot copy inconsistent bitmap '{bitmap.name}'", path=source.filename,
                hint="Skip those that are broken (--skip-broken-bitmaps), or remove it.",
                advice="Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
            )  # fmt: skip
    broken = bitmaps.broken_reason(source)
    if broken is not None:
        raise broken


def check_target(target: Disk) -> None:
    """Raise NotSupported where *target* cannot keep bitmaps."""
    if not bitmaps.can_keep(target):
        raise NotSupported(
            f"'{target.filename}' cannot hold dirty bitmaps",
            qemu=f"Format driver '{target.format}' does not support bitmaps", path=target.filename,
            hint="Choose qcow2, version 3.",
        )  # fmt: skip


def copy_bitmaps(source: Disk, target: Disk, *, skip_broken: bool = False, warn: Warn | None = None) -> list[str]:
    """Give *target*, a copy of *source*, the same persistent bitmaps; return the names of those that were copied.

    Granularity and whether a bitmap follows writes stay as they are. With *skip_broken* those that are inconsistent, or that cannot be read,
    are left out, and *warn* is told. Raises InvalidArgument where a name is taken, BitmapUnusable, and what reading and writing raise.
    """
    copied = []
    broken = bitmaps.broken_reason(source)
    if skip_broken and broken is not None and warn is not None:
        warn(f"{source.filename}: bitmaps that cannot be read are not copied: {broken.message}")
    for bitmap in _persistent(source):
        if skip_broken and bitmap.inconsistent:
            if warn is not None:
                warn(f"Skipping inconsistent bitmap '{bitmap.name}'")
            continue
        try:
            _copy(bitmap, target)
        except BitmapUnusable as error:
            if not skip_broken:
                raise
            if warn is not None:
                warn(f"Skipping bitmap '{bitmap.name}': {error.message}")
        else:
            copied.append(bitmap.name)
    return copied


def _persistent(source: Disk) -> list[DirtyBitmap]:
    """Return the bitmaps that are kept, the last one first: it is in that order that QEMU finds something wrong."""
    return [bitmap for bitmap in reversed(bitmaps.readable_bitmaps(source)) if bitmap.persistent]


def _copy(bitmap: DirtyBitmap, target: Disk) -> None:
    try:
        content = bitmap.inconsistent or bitmap.bits
    except CowhandError as error:
        raise BitmapUnusable(
            f"bitmap '{bitmap.name}' cannot be read: {error.message}", qemu=error.qemu(), path=error.path, offset=error.offset
        ) from error  # fmt: skip
    del content
    try:
        bitmaps.add_bitmap(target, bitmap.name, granularity=bitmap.granularity, enabled=bitmap.enabled)
    except CowhandError as error:
        raise error.within(qemu=f"Failed to create bitmap {bitmap.name}") from None
    try:
        bitmaps.merge_bitmap(target, bitmap.name, bitmap)
    except CowhandError as error:
        bitmaps.remove_bitmap(target, bitmap.name)
        raise error.within(qemu=f"Failed to populate bitmap {bitmap.name}") from None

"""cowhand: virtual-machine disk storage in Python. Images, backing chains, snapshots; safe, and with a plan first.

>>> import cowhand
>>> with cowhand.open("disk.qcow2") as disk:
...     boot_sector = disk.read(0, 512)

What is in ``__all__`` is the library; ``docs/library.md`` has examples. What is behind a name is imported when the name is first used. Every function
may be called by many threads at once; all errors are CowhandErrors, and nothing is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.__about__ import __version__

if TYPE_CHECKING:
    import os
    from contextlib import AbstractContextManager

    from cowhand.bitmaps.named import DirtyBitmap
    from cowhand.block.disk import Disk
    from cowhand.block.node.records import CheckResult, Finding, SnapshotInfo
    from cowhand.block.opening.policy import Policy
    from cowhand.copy.ops.checksum import Checksum, checksum
    from cowhand.copy.ops.compare import CompareResult, compare
    from cowhand.copy.ops.convert import ConvertResult, convert
    from cowhand.copy.ops.measure import Measurement, measure
    from cowhand.core import errors
    from cowhand.core.errors import CowhandError
    from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, ZERO, Extent, ExtentBatch, by_content
    from cowhand.core.progress import CancelToken, Progress
    from cowhand.image.bitmaps import (
        add_bitmap,
        clear_bitmap,
        dirty_extents,
        enable_bitmap,
        find_bitmap,
        list_bitmaps,
        merge_bitmap,
        remove_bitmap,
    )
    from cowhand.image.check import check
    from cowhand.image.compact import compact
    from cowhand.image.create import create
    from cowhand.image.info import ImageInfo, chain_info, image_info
    from cowhand.image.snapshots import (
        apply_snapshot,
        create_snapshot,
        delete_snapshot,
        find_snapshot,
        list_snapshots,
        open_snapshot,
    )
    from cowhand.image.untrusted import Verdict, judge
    from cowhand.image.usage import ImageUsage, image_usage
    from cowhand.jobs.commit import CommitResult, commit
    from cowhand.jobs.rebase import RebaseResult, rebase

#: Where the names lie that are imported when they are first used: starting a tool costs what it needs.
_PLACES = {
    "cowhand.bitmaps.named": ("DirtyBitmap",),
    "cowhand.image.bitmaps": (
        "add_bitmap", "clear_bitmap", "dirty_extents", "enable_bitmap", "find_bitmap", "list_bitmaps", "merge_bitmap", "remove_bitmap",
    ),
    "cowhand.image.check": ("CheckResult", "check"),
    "cowhand.image.create": ("create",),
    "cowhand.block.disk": ("Disk",),
    "cowhand.block.node.records": ("Finding",),
    "cowhand.block.opening.policy": ("Policy",),
    "cowhand.image.snapshots": (
        "SnapshotInfo", "apply_snapshot", "create_snapshot", "delete_snapshot", "find_snapshot", "list_snapshots", "open_snapshot",
    ),
    "cowhand.image.info": ("ImageInfo", "chain_info", "image_info"),
    "cowhand.image.untrusted": ("Verdict", "judge"),
    "cowhand.image.usage": ("ImageUsage", "image_usage"),
    "cowhand.copy.ops.checksum": ("Checksum", "checksum"),
    "cowhand.copy.ops.compare": ("CompareResult", "compare"),
    "cowhand.copy.ops.convert": ("ConvertResult", "convert"),
    "cowhand.copy.ops.measure": ("Measurement", "measure"),
    "cowhand.core.errors": ("CowhandError",),
    "cowhand.core.extents": ("ALLOCATED", "COMPRESSED", "DATA", "ZERO", "Extent", "ExtentBatch", "by_content"),
    "cowhand.core.progress": ("CancelToken", "Progress"),
    "cowhand.jobs.commit": ("CommitResult", "commit"),
    "cowhand.image.compact": ("compact",),
    "cowhand.jobs.rebase": ("RebaseResult", "rebase"),
}  # fmt: skip


if not TYPE_CHECKING:  # else every name would be there for the type checker

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name == "errors":
            value: Any = import_module("cowhand.core.errors")
        else:
            place = next((module for module, names in _PLACES.items() if name in names), None)
            if place is None:
                raise AttributeError(f"module 'cowhand' has no attribute '{name}'")
            value = getattr(import_module(place), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def open(
    what: str | os.PathLike[str] | Mapping[str, Any],
    *,
    writable: bool = False,
    format: str | None = None,
    backing: bool = True,
    cache: str = "writeback",
    force_share: bool = False,
    resizable: bool | None = None,
    policy: Policy | None = None,
    options: Mapping[str, Any] | None = None,
    secrets: Mapping[str, bytes | str] | None = None,
) -> Disk:
    """Open an image, with what lies under it, and return a :class:`cowhand.block.disk.Disk`.

    *what* is a path, a ``json:`` or ``PROTOCOL:`` name, or a description in QEMU's form ({"driver": "qcow2", "file": {...}}). *format* names the
    format instead of guessing it from the first bytes; a guessed raw image is opened for writing only as a block-wise copy of itself would
    be: its first sector may not become another format's header. Without *backing* the image is opened alone, and what its own layer does not store
    reads as zeroes. *resizable* False lets others rely on the length. *cache* is one of none, writethrough, writeback, directsync, unsafe.
    *force_share* takes no locks. *policy* says what the image itself may have opened. *options* are further ones of the image, by QEMU's names
    ("discard", "lazy-refcounts", "file.locking"); docs/drivers has them. *secrets* are the passphrases that ``key-secret`` options name, by id; none
    of them is part of a message or a name. Raises CowhandError; nothing stays open then.
    """
    from cowhand.block.disk import Disk
    from cowhand.block.node.options import cache_switches
    from cowhand.block.opening.opening import Opening
    from cowhand.block.opening.policy import DEFAULT
    from cowhand.drivers import REGISTRY

    write_through, direct, no_flush = cache_switches(cache)
    common: dict[str, Any] = {"read-only": not writable}
    if direct:
        common["cache.direct"] = True
    if no_flush:
        common["cache.no-flush"] = True
    if force_share:
        common["force-share"] = True
    opening = Opening(REGISTRY, policy or DEFAULT, backing=backing)
    if secrets:
        from cowhand.crypto.secrets import given

        with given(secrets):
            root = opening.open(what, format=format, options={**common, **(options or {})})
    else:
        root = opening.open(what, format=format, options={**common, **(options or {})})
    try:
        return Disk(root, writable=writable, resizable=resizable, write_through=write_through)
    except BaseException:
        opening.abandon()
        raise


def secrets(passphrases: Mapping[str, bytes | str]) -> AbstractContextManager[None]:
    """Hold *passphrases*, by the ids that ``key-secret`` options name, while a ``with`` block runs.

    They are the process's, not the thread's: blocks that run at the same time need ids of their own.
    """
    from cowhand.crypto.secrets import given

    return given(passphrases)


__all__ = [
    "__version__",
    # disks, and what they are made of
    "open", "secrets", "Disk", "Policy", "Extent", "ExtentBatch", "by_content", "DATA", "ZERO", "ALLOCATED", "COMPRESSED",
    # images
    "create", "image_info", "chain_info", "ImageInfo", "image_usage", "ImageUsage", "check", "CheckResult", "Finding", "judge", "Verdict",
    # copies
    "convert", "ConvertResult", "compare", "CompareResult", "measure", "Measurement", "checksum", "Checksum",
    # chains
    "commit", "CommitResult", "rebase", "RebaseResult", "compact",
    # snapshots
    "list_snapshots", "find_snapshot", "create_snapshot", "apply_snapshot", "delete_snapshot", "open_snapshot", "SnapshotInfo",
    # dirty bitmaps
    "list_bitmaps", "find_bitmap", "add_bitmap", "remove_bitmap", "clear_bitmap", "enable_bitmap", "merge_bitmap", "dirty_extents", "DirtyBitmap",
    # of long operations, and of what goes wrong
    "Progress", "CancelToken", "CowhandError", "errors",
]  # fmt: skip

"""cowhand: virtual-machine disk storage in Python. Images, backing chains, snapshots; safe, and with a plan first.

>>> import cowhand
>>> with cowhand.open("disk.qcow2") as disk:
...     boot_sector = disk.read(0, 512)

What is in ``__all__`` is the library; ``docs/library.md`` has examples. What is behind a name is imported when the name is first used. Every function
may be called by many threads at once; all errors are CowhandErrors, and nothing is printed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.__about__ import __version__

if TYPE_CHECKING:
    from cowhand.bitmaps.named import DirtyBitmap
    from cowhand.block.disk import Disk
    from cowhand.block.locking.device_use import allowed as allow_used_devices
    from cowhand.block.locking.image_lock import missing_locks_allowed
    from cowhand.block.node.records import CheckResult, Finding, SnapshotInfo
    from cowhand.block.opening.policy import Policy
    from cowhand.copy.ops.checksum import Checksum, checksum
    from cowhand.copy.ops.compare import CompareResult, compare
    from cowhand.copy.ops.convert import ConvertResult
    from cowhand.copy.ops.measure import Measurement, measure
    from cowhand.core import errors
    from cowhand.core.errors import CowhandError
    from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, ZERO, Extent, ExtentBatch, by_content
    from cowhand.core.progress import CancelToken, Progress
    from cowhand.crypto.secrets import given as secrets
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
    from cowhand.image.info import ImageInfo, chain_info, image_info
    from cowhand.image.key_slots import KeySlot, add_passphrase, change_passphrase, key_slots, remove_passphrase
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
    from cowhand.jobs.commit import CommitResult
    from cowhand.jobs.rebase import RebaseResult
    from cowhand.plans.commit import plan_commit
    from cowhand.plans.dependents import Dependents, find_dependents
    from cowhand.plans.guard import DependentsGuard
    from cowhand.plans.opening import open_image as open  # noqa: A004 - the name that users meet
    from cowhand.plans.plan import Plan, Touch
    from cowhand.plans.rebase import plan_rebase
    from cowhand.plans.resize import plan_resize
    from cowhand.plans.verbs import commit, convert, create, dd, rebase

#: Where the names lie that are imported when they are first used: starting a tool costs what it needs.
_PLACES = {
    "cowhand.bitmaps.named": ("DirtyBitmap",),
    "cowhand.image.bitmaps": (
        "add_bitmap", "clear_bitmap", "dirty_extents", "enable_bitmap", "find_bitmap", "list_bitmaps", "merge_bitmap", "remove_bitmap",
    ),
    "cowhand.image.check": ("check",),
    "cowhand.block.disk": ("Disk",),
    "cowhand.block.locking.image_lock": ("missing_locks_allowed",),
    "cowhand.block.node.records": ("CheckResult", "Finding", "SnapshotInfo"),
    "cowhand.block.opening.policy": ("Policy",),
    "cowhand.image.snapshots": (
        "apply_snapshot", "create_snapshot", "delete_snapshot", "find_snapshot", "list_snapshots", "open_snapshot",
    ),
    "cowhand.image.key_slots": ("KeySlot", "add_passphrase", "change_passphrase", "key_slots", "remove_passphrase"),
    "cowhand.image.info": ("ImageInfo", "chain_info", "image_info"),
    "cowhand.image.untrusted": ("Verdict", "judge"),
    "cowhand.image.usage": ("ImageUsage", "image_usage"),
    "cowhand.copy.ops.checksum": ("Checksum", "checksum"),
    "cowhand.copy.ops.compare": ("CompareResult", "compare"),
    "cowhand.copy.ops.convert": ("ConvertResult",),
    "cowhand.copy.ops.measure": ("Measurement", "measure"),
    "cowhand.core.errors": ("CowhandError",),
    "cowhand.core.extents": ("ALLOCATED", "COMPRESSED", "DATA", "ZERO", "Extent", "ExtentBatch", "by_content"),
    "cowhand.core.progress": ("CancelToken", "Progress"),
    "cowhand.jobs.commit": ("CommitResult",),
    "cowhand.image.compact": ("compact",),
    "cowhand.jobs.rebase": ("RebaseResult",),
    "cowhand.plans.commit": ("plan_commit",),
    "cowhand.plans.plan": ("Plan", "Touch"),
    "cowhand.plans.rebase": ("plan_rebase",),
    "cowhand.plans.resize": ("plan_resize",),
    "cowhand.plans.dependents": ("Dependents", "find_dependents"),
    "cowhand.plans.guard": ("DependentsGuard",),
    "cowhand.plans.verbs": ("commit", "convert", "create", "dd", "rebase"),
}  # fmt: skip


#: Names that are shorter here than where they lie.
_RENAMED = {
    "open": ("cowhand.plans.opening", "open_image"),
    "secrets": ("cowhand.crypto.secrets", "given"),
    "allow_used_devices": ("cowhand.block.locking.device_use", "allowed"),
}


if not TYPE_CHECKING:  # else every name would be there for the type checker

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name == "errors":
            value: Any = import_module("cowhand.core.errors")
        elif name in _RENAMED:
            module, original = _RENAMED[name]
            value = getattr(import_module(module), original)
        else:
            place = next((module for module, names in _PLACES.items() if name in names), None)
            if place is None:
                raise AttributeError(f"module 'cowhand' has no attribute '{name}'")
            value = getattr(import_module(place), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "__version__",
    # disks, and what they are made of
    "open", "secrets", "missing_locks_allowed", "allow_used_devices",
    "Disk", "Policy", "Extent", "ExtentBatch", "by_content", "DATA", "ZERO", "ALLOCATED", "COMPRESSED",
    # images
    "create", "image_info", "chain_info", "ImageInfo", "image_usage", "ImageUsage", "check", "CheckResult", "Finding", "judge", "Verdict",
    # copies
    "convert", "ConvertResult", "dd", "compare", "CompareResult", "measure", "Measurement", "checksum", "Checksum",
    # chains
    "commit", "CommitResult", "rebase", "RebaseResult", "compact", "find_dependents", "Dependents", "DependentsGuard",
    "plan_commit", "plan_rebase", "plan_resize", "Plan", "Touch",
    # passphrases
    "key_slots", "add_passphrase", "change_passphrase", "remove_passphrase", "KeySlot",
    # snapshots
    "list_snapshots", "find_snapshot", "create_snapshot", "apply_snapshot", "delete_snapshot", "open_snapshot", "SnapshotInfo",
    # dirty bitmaps
    "list_bitmaps", "find_bitmap", "add_bitmap", "remove_bitmap", "clear_bitmap", "enable_bitmap", "merge_bitmap", "dirty_extents", "DirtyBitmap",
    # of long operations, and of what goes wrong
    "Progress", "CancelToken", "CowhandError", "errors",
]  # fmt: skip

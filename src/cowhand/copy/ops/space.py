"""Is there room for the target? Known before, it is said before; found out too late, it is said how much is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowhand.copy.engine import plan
from cowhand.copy.engine.plan import Policy
from cowhand.core.errors import NoSpace
from cowhand.core.units import format_size
from cowhand.image.create import Creation, local_path

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.copy.engine.source import Source
    from cowhand.copy.ops.settings import Settings
    from cowhand.core.progress import Progress


def free_bytes(path: str) -> int | None:
    """Return what this user can still write to the file system of *path* (or of its folder), None where nobody can tell."""
    if not hasattr(os, "statvfs"):
        return None
    for name in (path, os.path.dirname(path) or "."):
        try:
            found = os.statvfs(name)
        except OSError:
            continue
        blocks = found.f_bfree if hasattr(os, "geteuid") and os.geteuid() == 0 else found.f_bavail
        return blocks * found.f_frsize
    return None


def check_space(
    source: Source, creation: Creation, settings: Settings, *, in_place: bool, warn: Callable[[str], None] | None
) -> None:
    """Raise NoSpace when the target certainly does not fit; tell *warn* when it may not.

    What is replaced, not written *in_place*, keeps its space until the target is complete. It is certain only where every byte is going to be
    written: without a search for zeroes, or with preallocation.
    """
    path = local_path(creation.filename)
    if path is None or creation.protocol.name != "file":
        return
    free = free_bytes(path)
    if free is None:
        return
    if in_place and os.path.exists(path):
        free += os.stat(path).st_blocks * 512
    certain = not settings.compressed and (
        settings.sparse_size == 0 or creation.options.get("preallocation") in ("falloc", "full")
    )
    if free >= source.size and not certain:
        return
    needed = source.size
    if not certain:
        needed = plan.totals(source.runs(Policy(skip_unallocated="backing_file" in creation.options))).data
    if needed <= free:
        return
    amounts = f"{format_size(needed)} for '{path}', of which {format_size(free)} are free"
    if certain:
        raise NoSpace(
            f"the target does not fit: it needs {amounts}",
            path=path,
            qemu="No space left on device",
            hint=f"Make {format_size(needed - free)} free, or write the target elsewhere.",
        )
    if warn is not None:
        warn(f"the target may not fit: up to {amounts}")


def explain(disk: Disk, progress: Progress) -> str | None:
    """Say how much is missing after a target ran out of space, None where it is not known."""
    path = local_path(disk.filename)
    free = free_bytes(path) if path is not None else None
    if free is None:
        return None
    missing = max(0, progress.total - progress.done - free)
    return (
        f"Up to {format_size(missing)} more are needed beside the {format_size(free)} that are free."
        if missing
        else None
    )

"""Is there room for the target? Known before, it is said before; found out too late, it is said how much is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowhand.block.format_io.format_node import FormatNode
from cowhand.copy.engine import plan
from cowhand.copy.engine.plan import Policy
from cowhand.copy.ops.room import holding_data
from cowhand.core.errors import NoSpace
from cowhand.core.mounts import free_bytes
from cowhand.core.units import format_size
from cowhand.image.create import Creation, local_path
from cowhand.image.replacing import reason_for_place

#: Zeroes that are certainly left out, whatever the format.
UNIT = 1 << 16

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.copy.engine.source import Source
    from cowhand.copy.ops.settings import Settings
    from cowhand.core.progress import Progress


def look_for_space(
    source: Source,
    creation: Creation,
    settings: Settings,
    *,
    in_place: bool = False,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Raise NoSpace when the target certainly does not fit; tell *warn* when it may not.

    What is replaced, not written *in_place*, keeps its space until the target is complete. It is certain only where every byte is going to be
    written: without a search for zeroes, or with preallocation.
    """
    path = local_path(creation.filename)
    if path is None or creation.protocol.name not in ("file", "host_device"):
        return
    device = creation.protocol.name == "host_device"
    if device and not issubclass(creation.format.load(), FormatNode):
        return  # bytes in their places, which are there or not
    free = _length(path) if device else free_bytes(path)
    if free is None:
        return
    if (
        not device
        and os.path.exists(path)
        and (in_place or reason_for_place(path, names_relative=creation.names_relative))
    ):
        free += os.stat(path).st_blocks * 512
    certain = not settings.compressed and (
        settings.sparse_size == 0 or creation.options.get("preallocation") in ("falloc", "full")
    )
    if free >= source.size and not certain:
        return
    needed = source.size
    if not certain:
        policy = Policy(skip_unallocated="backing_file" in creation.options)
        needed = plan.totals(source.runs(policy)).data
        if needed > free and device and not settings.compressed and not settings.salvage:
            # What is on the device now would be gone: so it is read how much there is beside zeroes.
            needed = sum(run.length for run in holding_data(source, source.runs(policy), UNIT))
            certain = True
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


def _length(path: str) -> int | None:
    """Return the length of a device, None where it cannot be asked."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    except OSError:
        return None
    finally:
        os.close(descriptor)


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

"""Opening what qemu-nbd's command line names: an image, a temporary overlay over it, a snapshot inside, a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cowhand.block.opening.filenames import FileName
from cowhand.cli.compat import program
from cowhand.cli.compat.images import describe, open_disk, open_temporary
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError, NotSupported

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.cli.compat.nbd.settings import Settings

_DIRECT = ("none", "off", "directsync")


def open_exported(settings: Settings, stack: ExitStack) -> Disk:
    """Return the disk that *settings* want exported; *stack* closes it. Raises Failure in the tool's words."""
    name = settings.image
    assert name is not None
    writable = not (settings.read_only or settings.snapshot is not None)
    cache = settings.cache or "writeback"
    try:
        if settings.aio == "native" and cache not in _DIRECT:
            raise Failure("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        what = describe(name, settings.image_opts, has_format=settings.format is not None)
        if settings.temporary and settings.snapshot is None:
            disk = open_temporary(
                what, format=settings.format, writable=writable, cache=cache, options=settings.options
            )
        else:
            disk = open_disk(what, format=settings.format, writable=writable, cache=cache, options=settings.options)
    except CowhandError as error:
        raise Failure(
            f"Failed to blk_new_open '{name}': {error.qemu()}", hint=error.facts.get("advice") or ""
        ) from None
    except Failure as failure:
        raise Failure(f"Failed to blk_new_open '{name}': {failure.message}") from None
    if settings.offset:
        try:
            part = _part(what, disk, settings)
        finally:
            disk.close()
        disk = open_disk(part, writable=writable, cache=cache, options=settings.options)
    stack.callback(disk.close)
    if settings.snapshot is not None:
        disk = _snapshot(disk, settings.snapshot)
        stack.callback(disk.close)
    return disk


def _part(what: str | Mapping[str, Any], disk: Disk, settings: Settings) -> Mapping[str, Any]:
    """Describe what lies from the offset on of *what*, which *disk* has open."""
    offset = settings.offset or 0
    if offset < 0 and program.since("8.2"):
        raise Failure(f"Value '{offset}' is out of range for parameter 'offset'")
    if offset < 0:
        hint = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
        raise Failure("Parameter 'offset' expects a non-negative number below 2^64", hint=hint)
    if offset > disk.size:
        raise Failure(f"Offset ({offset}) cannot be greater than size of the containing file ({disk.size})")
    below: dict[str, Any] = dict(what) if isinstance(what, Mapping) else {"filename": FileName(what)}
    below.setdefault("driver", disk.format)
    return {"driver": "raw", "offset": offset, "file": {**settings.options, **below}}


def _snapshot(disk: Disk, wanted: dict[str, str] | str) -> Disk:
    from cowhand.image.snapshots import list_snapshots, open_snapshot

    try:
        if isinstance(wanted, str):
            return open_snapshot(disk, wanted)
        for found in list_snapshots(disk):
            if wanted.get("id", found.id) == found.id and wanted.get("name", found.name) == found.name:
                return open_snapshot(disk, found.id)
    except CowhandError as error:
        text = "Can't find snapshot" if error.code == "snapshot-not-found" else error.qemu()
        if isinstance(error, NotSupported):
            text = f"Block format '{disk.format}' used by device '' does not support temporarily loading internal snapshots"
        raise Failure(f"Failed to load snapshot: {text}") from None
    raise Failure("Failed to load snapshot: Can't find snapshot")

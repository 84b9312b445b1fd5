"""What a copy may be told about how bytes are moved, and what of it contradicts itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.copy.engine.engine import MAX_WORKERS, WORKERS
from cowhand.copy.engine.source import SECTOR
from cowhand.core.errors import InvalidArgument
from cowhand.core.units import parse_size

if TYPE_CHECKING:
    from cowhand.block.node.records import SnapshotInfo
    from cowhand.copy.engine.throttle import Throttle
    from cowhand.image.open import Image

#: Zeroes that are worth leaving out of a target, as in qemu-img.
DEFAULT_SPARSE = 4096
MAX_SPARSE = 16 << 20


class Settings(NamedTuple):
    """How bytes are moved; see :func:`cowhand.copy.ops.convert.convert`. Sizes are bytes, the limit bytes a second (0: none)."""

    compressed: bool = False
    compression_level: int | None = None
    sparse_size: int = DEFAULT_SPARSE
    workers: int | None = None
    in_order: bool = True
    salvage: bool = False
    copy_range: bool = False
    reflink: bool = True
    rate_limit: int = 0


class Request(NamedTuple):
    """What a conversion is to make of what; see :func:`cowhand.copy.ops.convert.convert`."""

    inputs: Sequence[Image]
    target: Any
    target_format: str | None
    options: Mapping[str, Any]
    backing: str | None
    backing_format: str | None
    skip_create: bool
    target_is_zero: bool
    overwrite: bool
    like_qemu: bool
    snapshot: str | SnapshotInfo | None
    snapshots: bool
    bitmaps: bool
    skip_broken_bitmaps: bool
    cache: str


def parse_sparse(value: int | str) -> int:
    """Return -S's size in bytes; raises InvalidArgument."""
    size = parse_size(value)
    if size % SECTOR or size > MAX_SPARSE:
        raise InvalidArgument(
            f"Invalid buffer size for sparse output specified. Valid sizes are multiples of {SECTOR} up to {MAX_SPARSE}. "
            "Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


def check_request(request: Request, settings: Settings) -> None:
    """Refuse what contradicts itself, before anything is opened. Raises InvalidArgument."""
    inputs, backing, skip_create, target_is_zero = (
        request.inputs,
        request.backing,
        request.skip_create,
        request.target_is_zero,
    )
    if not inputs:
        raise InvalidArgument("Must specify image file name")
    if settings.workers is not None and not 1 <= settings.workers <= MAX_WORKERS:
        raise InvalidArgument(
            f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_WORKERS}"
        )
    for wrong, message in (
        (settings.compressed and settings.copy_range, "Cannot enable copy offloading when -c is used"),
        (
            settings.copy_range and settings.sparse_size != DEFAULT_SPARSE,
            "Cannot enable copy offloading when -S is used",
        ),
        (settings.copy_range and settings.salvage, "Cannot use copy offloading in salvaging mode"),
        (skip_create and request.options, "-o has no effect when skipping image creation"),
        (target_is_zero and not skip_create, "--target-is-zero requires use of -n flag"),
        (
            target_is_zero and backing is not None,
            "Cannot use --target-is-zero when the destination image has a backing file",
        ),
        (request.snapshot is not None and len(inputs) > 1, "No support for concatenating multiple snapshot"),
        (
            backing is not None and len(inputs) > 1,
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ),
    ):
        if wrong:
            raise InvalidArgument(message)


def workers_for(settings: Settings) -> int:
    """Return how many threads the copy is given."""
    cores = os.cpu_count() or 1
    if settings.compressed:
        # Compression is bound by the processor. More threads than it has cores wait for one another's turn to place what they have.
        return min(settings.workers if settings.workers is not None else MAX_WORKERS, max(cores, WORKERS))
    if settings.workers is not None:
        return settings.workers
    # Of what cannot be read is told in the order of the disk.
    return 1 if settings.salvage else WORKERS


def throttle_for(settings: Settings) -> Throttle | None:
    """Return the limit that one copy's workers share, None where there is none."""
    if not settings.rate_limit:
        return None
    from cowhand.copy.engine.throttle import Throttle

    return Throttle(settings.rate_limit)

"""Converting: the content of one or several disks into another image, new or existing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.copy import bitmaps as copying, plan
from cowhand.copy.engine import Engine
from cowhand.copy.opening import Image, open_source
from cowhand.copy.plan import Policy
from cowhand.copy.settings import DEFAULT_SPARSE, Settings, check_request, parse_sparse, workers_for
from cowhand.copy.source import SECTOR, SalvagingSource, Source
from cowhand.copy.target import Target, check_room, create_target, existing_target
from cowhand.core.errors import CowhandError, InvalidArgument, NoSpace, NotSupported
from cowhand.core.memory import expect_bulk
from cowhand.core.progress import CancelToken, Progress
from cowhand.core.units import parse_size

if TYPE_CHECKING:
    from cowhand.block.create import Creation
    from cowhand.block.policy import Policy as OpenPolicy
    from cowhand.block.registry import Registry
    from cowhand.copy.sink import Sink


class ConvertResult(NamedTuple):
    """What a conversion did. Bytes: ``size`` of the target's disk; ``copied`` read as data; ``zeroes`` known to be zero without reading;
    ``skipped`` left to the target's backing file. ``unreadable``: offsets of sectors that salvaging replaced by zeroes."""

    filename: str
    format: str
    size: int
    copied: int
    zeroes: int
    skipped: int
    unreadable: tuple[int, ...] = ()


def convert(
    sources: Image | Sequence[Image],
    target: str | os.PathLike[str] | Mapping[str, Any] | Disk,
    target_format: str | None = None,
    *,
    source_format: str | None = None,
    options: Mapping[str, Any] | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    skip_create: bool = False,
    target_is_zero: bool = False,
    overwrite: bool = False,
    snapshot: str | None = None,
    compressed: bool = False,
    compression_level: int | None = None,
    sparse_size: int | str = DEFAULT_SPARSE,
    workers: int | None = None,
    in_order: bool = True,
    salvage: bool = False,
    copy_range: bool = False,
    reflink: bool = True,
    rate_limit: int | str = 0,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    snapshots: bool = False,
    cache: str = "unsafe",
    source_cache: str = "writeback",
    force_share: bool = False,
    policy: OpenPolicy | None = None,
    registry: Registry | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
    warn: Callable[[str], None] | None = None,
) -> ConvertResult:
    """Copy the content of *sources*, one behind the other, into *target*.

    A new target of *target_format* (default raw) is made with *options*; it appears under its name when it is complete, and never in place of
    another file unless *overwrite* is set (that one is then written in place). With *skip_create* (-n) an existing image, or an open disk, is
    written in place; *target_is_zero* promises that it reads as zeroes. *backing* and *backing_format* (-B, -F) leave to the backing file
    what the source's own layer does not allocate. *snapshot* reads the (one) source at an internal snapshot.

    *sparse_size* (-S): runs of zeroes of at least so many bytes are left out; 0 writes every byte. *compressed* stores compressed clusters,
    with *compression_level* more densely than the fast default. *workers* threads (-m), *in_order* as -W's opposite: space is taken in the
    order of the disk. *salvage* replaces unreadable sectors by zeroes. *reflink* shares blocks where the file system can, *copy_range* (-C)
    uses copy_file_range(2) as well. *rate_limit* is in bytes a second. *cache* "unsafe" does not flush a target, as in qemu-img.
    *snapshots* copies the internal snapshots of the (one) source too, with their ids, names, dates and VM states, into a new qcow2 image.
    *bitmaps* copies the persistent bitmaps of the (one) source's active layer too, *skip_broken_bitmaps* but for those that cannot be used.

    *progress* hears of bytes copied, *cancel* ends it with Cancelled, *warn* hears of what may go wrong. The sources are never changed; a
    new target that fails is removed. Raises CowhandError; ``qemu()`` has qemu-img's words.
    """
    settings = Settings(
        compressed,
        compression_level,
        parse_sparse(sparse_size),
        workers,
        in_order,
        salvage,
        copy_range,
        reflink and sparse_size == DEFAULT_SPARSE,
        parse_size(rate_limit),
    )
    inputs: Sequence[Image] = sources if isinstance(sources, (list, tuple)) else (sources,)
    skip_create = skip_create or isinstance(target, Disk)
    check_request(settings, inputs, skip_create, target_is_zero, backing, options, snapshot)
    with ExitStack() as stack:
        disks = [
            open_source(
                what,
                stack,
                source_format,
                snapshot=snapshot,
                cache=source_cache,
                force_share=force_share,
                unshared=True,
                policy=policy,
            )
            for what in inputs
        ]
        if bitmaps or skip_broken_bitmaps:
            _check_bitmaps(disks, bitmaps, skip_broken_bitmaps)
        if snapshots:
            from cowhand.copy.history import check_history

            contradictions = (
                (skip_create, "an existing target"),
                (len(disks) > 1, "several sources"),
                (snapshot is not None, "the choice of one snapshot"),
                (backing is not None or "backing_file" in (options or {}), "a backing file of the target"),
                ((options or {}).get("data_file"), "a data file of the target"),
                (salvage, "salvaging"),
                (settings.sparse_size == 0, "a sparse size of 0"),
            )
            check_history(disks[0], target_format or "raw", wrong=contradictions)
        size = sum(-(-disk.size // SECTOR) * SECTOR for disk in disks)
        creation = None
        has_backing = backing is not None
        if not skip_create:
            creation = _prepare(target, target_format, size, options, backing, backing_format, registry, policy)
            has_backing = "backing_file" in creation.options
            _check_creation(settings, creation, len(disks))
        unreadable: list[int] = []
        source = _source(disks, settings, has_backing, unreadable, warn)
        if creation is not None:
            destination = _new_target(source, creation, settings, overwrite, cache, policy, warn)
        else:
            discard = settings.sparse_size > 0
            destination = existing_target(target, target_format, cache=cache, policy=policy, discard=discard)
        with destination:
            if bitmaps:
                copying.check_target(destination.disk)
            check_room(destination.disk, source.size)
            if snapshots:
                moved = _with_history(disks[0], destination, settings, progress, cancel)
            else:
                moved = transfer(
                    source,
                    destination,
                    settings,
                    has_backing=has_backing,
                    reads_zero=target_is_zero,
                    progress=progress,
                    cancel=cancel,
                )
            if bitmaps:
                copying.copy_bitmaps(disks[0], destination.disk, skip_broken=skip_broken_bitmaps, warn=warn)
            filename, format = destination.disk.filename, destination.disk.format
    name = creation.filename if creation is not None else filename
    return ConvertResult(name, format, size, moved.data, moved.zero, moved.skip, tuple(unreadable))


def transfer(
    source: Source,
    target: Target,
    settings: Settings,
    *,
    has_backing: bool = False,
    reads_zero: bool = False,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> plan.Totals:
    """Copy *source* into the open *target* as *settings* say; return the bytes that were planned of each kind.

    *has_backing*: what the source's own layers do not allocate shows through from the target's backing file already. *reads_zero* promises that
    the target reads as zeroes; a new one without a backing file does anyway.
    """
    progress = progress or Progress()
    fresh = target.is_new and settings.sparse_size > 0 and not has_backing and target.disk.root.zero_when_new
    sink = _sink(target.disk, settings, reads_zero=reads_zero or fresh)
    below = target.disk.root.backing if has_backing and target.is_new else None
    policy = Policy(
        unit=sink.unit,
        skip_unallocated=has_backing,
        skip_zero_from=below.node.size if below is not None else None,
        zeroes_are_data=settings.sparse_size == 0,
    )
    totals = plan.totals(source.runs(policy))
    progress.total = totals.data + (0 if sink.reads_zero else totals.zero)
    sink.expect(totals.data)
    expect_bulk(totals.data)
    cloner = throttle = None
    if (
        (settings.reflink or settings.copy_range)
        and not settings.compressed
        and not settings.salvage
        and settings.sparse_size
    ):
        from cowhand.copy.clone import Cloner

        cloner = Cloner(source, sink, copying=settings.copy_range)
    if settings.rate_limit:
        from cowhand.copy.throttle import Throttle

        throttle = Throttle(settings.rate_limit)
    engine = Engine(
        source,
        sink,
        workers=workers_for(settings),
        in_order=settings.in_order,
        progress=progress,
        cancel=cancel,
        throttle=throttle,
        cloner=cloner,
    )
    try:
        engine.run(source.runs(policy))
    except NoSpace as error:
        if error.hint is None:
            from cowhand.copy.space import explain

            error.hint = explain(target.disk, progress)
        raise
    progress.finish()
    return totals


def _with_history(
    disk: Disk, target: Target, settings: Settings, progress: Progress | None, cancel: CancelToken | None
) -> plan.Totals:
    from cowhand.copy.history import copy_history

    def first(state: Disk, part: Progress) -> plan.Totals:
        return transfer(Source([state]), target, settings, progress=part, cancel=cancel)

    moved, _ = copy_history(disk, target.disk, settings, first, progress=progress, cancel=cancel)
    return moved


def _check_bitmaps(disks: Sequence[Disk], wanted: bool, skip_broken: bool) -> None:
    if not wanted:
        raise InvalidArgument("Use of --skip-broken-bitmaps requires --bitmaps")
    if len(disks) > 1:
        raise InvalidArgument("Copying bitmaps only possible with single source")
    copying.check_bitmaps(disks[0], skip_broken=skip_broken)


def _prepare(
    target: Any,
    format: str | None,
    size: int,
    options: Mapping[str, Any] | None,
    backing: str | None,
    backing_format: str | None,
    registry: Registry | None,
    policy: OpenPolicy | None,
) -> Creation:
    from cowhand.block.create import prepare

    if isinstance(target, Mapping):
        raise InvalidArgument(
            "a description of the target needs one that exists", qemu="--target-image-opts requires use of -n flag"
        )
    chosen = {name: value for name, value in (options or {}).items() if name != "size"}
    if chosen.get("backing_file") is not None and chosen.get("backing_fmt") is None and backing_format is None:
        raise InvalidArgument("Use of backing file requires explicit backing format")
    return prepare(
        target,
        format or "raw",
        size,
        chosen,
        backing=backing,
        backing_format=backing_format,
        registry=registry,
        policy=policy,
    )


def _new_target(
    source: Source,
    creation: Creation,
    settings: Settings,
    overwrite: bool,
    cache: str,
    policy: OpenPolicy | None,
    warn: Callable[[str], None] | None,
) -> Target:
    from cowhand.copy.space import check_space

    check_space(source, creation, settings, overwrite=overwrite, warn=warn)
    try:
        return create_target(
            creation, overwrite=overwrite, cache=cache, policy=policy, discard=settings.sparse_size > 0
        )
    except CowhandError as error:
        raise error.within(qemu=f"{creation.filename}: error while converting {creation.format.name}") from None


def _check_creation(settings: Settings, creation: Creation, sources: int) -> None:
    if "backing_file" in creation.options and sources > 1:
        raise InvalidArgument(
            "Having a backing file for the target makes no sense when concatenating multiple input images"
        )
    if settings.compressed:
        if not can_compress(creation.format.load()):
            raise NotSupported("Compression not supported for this file format")
        if any(creation.options.get(name) for name in ("encryption", "encrypt.format")):
            raise InvalidArgument("Compression and encryption not supported at the same time")
        if creation.options.get("preallocation", "off") != "off":
            raise InvalidArgument("Compression and preallocation not supported at the same time")


def can_compress(cls: type) -> bool:
    """Tell whether a format's class stores compressed units."""
    return hasattr(cls, "codec")


def _source(
    disks: Sequence[Disk],
    settings: Settings,
    has_backing: bool,
    unreadable: list[int],
    warn: Callable[[str], None] | None,
) -> Source:
    depth = 1 if has_backing else None
    if not settings.salvage:
        return Source(disks, depth=depth)

    def report(offset: int, error: CowhandError) -> None:
        unreadable.append(offset)
        if warn is not None:
            warn(f"error while reading offset {offset}: {error.qemu()}")

    def unknown(offset: int, error: CowhandError) -> None:
        if warn is not None:
            warn(f"error while reading block status at offset {offset}: {error.qemu()}")

    return SalvagingSource(disks, depth=depth, report=report, unknown=unknown)


def _sink(disk: Disk, settings: Settings, *, reads_zero: bool) -> Sink:
    if settings.compressed:
        from cowhand.copy.compress import choose_compressed

        return choose_compressed(
            disk, sparse=settings.sparse_size, reads_zero=reads_zero, level=settings.compression_level
        )
    from cowhand.copy.sink import choose

    return choose(disk, sparse=settings.sparse_size, reads_zero=reads_zero)


__all__ = ["DEFAULT_SPARSE", "ConvertResult", "Settings", "can_compress", "convert", "transfer"]

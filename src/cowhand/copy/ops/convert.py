"""Converting: the content of one or several disks into another image, new or existing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.block.format_io.format_node import FormatNode
from cowhand.copy.engine import plan
from cowhand.copy.engine.source import SECTOR, SalvagingSource, Source
from cowhand.copy.ops import convert_bitmaps as copying
from cowhand.copy.ops.overlap import refuse_own_source
from cowhand.copy.ops.settings import DEFAULT_SPARSE, Request, Settings, check_request, parse_sparse
from cowhand.copy.ops.target import Target, check_room, create_target, existing_target
from cowhand.copy.ops.transfer import transfer
from cowhand.copy.ops.unreadable import Range, Unreadable
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported
from cowhand.core.progress import CancelToken, Progress
from cowhand.core.units import parse_size
from cowhand.image.create import local_path
from cowhand.image.open import Image, open_source

if TYPE_CHECKING:
    from cowhand.block.node.guard import Guard
    from cowhand.block.node.records import SnapshotInfo
    from cowhand.block.opening.policy import Policy as OpenPolicy
    from cowhand.block.opening.registry import Registry
    from cowhand.image.create import Creation


class ConvertResult(NamedTuple):
    """What a conversion did. Bytes: ``size`` of the target's disk; ``copied`` read as data; ``zeroes`` known to be zero without reading;
    ``skipped`` left to the target's backing file. ``unreadable_ranges``: offsets and lengths of what salvaging replaced by zeroes, and
    ``unreadable_reason`` the first error there."""

    filename: str
    format: str
    size: int
    copied: int
    zeroes: int
    skipped: int
    unreadable_ranges: tuple[Range, ...] = ()
    unreadable_reason: CowhandError | None = None

    @property
    def unreadable(self) -> tuple[int, ...]:
        """The offsets of all sectors in ``unreadable_ranges``."""
        return tuple(at for begin, length in self.unreadable_ranges for at in range(begin, begin + length, SECTOR))


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
    like_qemu: bool = False,
    snapshot: str | SnapshotInfo | None = None,
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
    force: bool = False,
    guard: Guard | None = None,
) -> ConvertResult:
    """Copy the content of *sources*, one behind the other, into *target*.

    A new target of *target_format* (default raw) is made with *options*; it appears under its name when it is complete, and never in place of
    another file unless *overwrite* is set. That one, too, stays until the new one is complete; a device, or a file that cannot be replaced, is
    written in place, which *warn* hears before, and so is everything with *like_qemu*. With *skip_create* (-n) an existing image, or an open disk, is
    written in place; *target_is_zero* promises that it reads as zeroes, which is looked into as far as that
    is cheap (not with *like_qemu*): where it does not, zeroes are written. *backing* and *backing_format* (-B, -F) leave to the backing file
    what the source's own layer does not allocate. *snapshot* reads the (one) source at an internal snapshot.

    *sparse_size* (-S): runs of zeroes of at least so many bytes are left out; 0 writes every byte. *compressed* stores compressed clusters,
    with *compression_level* more densely than the fast default. *workers* threads (-m), *in_order* as -W's opposite: space is taken in the
    order of the disk. *salvage* replaces unreadable sectors by zeroes. *reflink* shares blocks where the file system can, *copy_range* (-C)
    uses copy_file_range(2) as well. *rate_limit* is in bytes a second. *cache* "unsafe" does not flush a target, as in qemu-img.
    *snapshots* copies the internal snapshots of the (one) source too, with their ids, names, dates and VM states, into a new qcow2 image.
    *bitmaps* copies the persistent bitmaps of the (one) source's active layer too, *skip_broken_bitmaps* but for those that cannot be used.

    *guard* refuses to write over what other images read through (OverlaysExist, SearchIncomplete) unless *force* is set, and a loop in any case;
    ``cowhand.convert`` always has one.

    *progress* hears of bytes copied, *cancel* ends it with Cancelled, *warn* hears of what may go wrong. The sources are never changed; a
    new target that fails is removed. Raises CowhandError; ``qemu()`` has qemu-img's words.
    """
    sparse = parse_sparse(sparse_size)
    settings = Settings(
        compressed=compressed,
        compression_level=compression_level,
        sparse_size=sparse,
        workers=workers,
        in_order=in_order,
        salvage=salvage,
        copy_range=copy_range,
        reflink=reflink and sparse == DEFAULT_SPARSE,
        rate_limit=parse_size(rate_limit),
    )
    request = Request(
        inputs=sources if isinstance(sources, (list, tuple)) else (sources,),
        target=target,
        target_format=target_format,
        options=options or {},
        backing=backing,
        backing_format=backing_format,
        skip_create=skip_create or isinstance(target, Disk),
        target_is_zero=target_is_zero,
        overwrite=overwrite,
        like_qemu=like_qemu,
        snapshot=snapshot,
        snapshots=snapshots,
        bitmaps=bitmaps,
        skip_broken_bitmaps=skip_broken_bitmaps,
        cache=cache,
    )
    check_request(request, settings)
    with ExitStack() as stack:
        disks = [
            open_source(
                what,
                stack,
                source_format,
                cache=source_cache,
                force_share=force_share,
                unshared=True,
                policy=policy,
            )
            for what in request.inputs
        ]
        active = disks[0]
        if snapshot is not None:
            disks = [open_source(active, stack, snapshot=snapshot)]
        conversion = _Conversion(request, settings, disks, active, warn)
        conversion.check_sources()
        conversion.prepare(registry, policy)
        with conversion.open_target(policy, guard, force=force) as destination:
            return conversion.copy(destination, progress, cancel)


class _Conversion:
    """One call of :func:`convert` whose sources are open; the public methods are its steps, in their order."""

    def __init__(
        self,
        request: Request,
        settings: Settings,
        disks: Sequence[Disk],
        active: Disk,
        warn: Callable[[str], None] | None,
    ) -> None:
        self.request = request
        self.settings = settings
        self.disks = disks
        self._active = active  # has the bitmaps, also where a snapshot is what is copied
        self.size = sum(-(-disk.size // SECTOR) * SECTOR for disk in disks)
        self._warn = warn or (lambda message: None)
        self._creation: Creation | None = None
        self._has_backing = request.backing is not None
        self._source: Source
        self._unreadable = Unreadable()

    def check_sources(self) -> None:
        """Refuse what the sources do not have, or what cannot go along."""
        request = self.request
        if request.skip_broken_bitmaps and not request.bitmaps:
            raise InvalidArgument("Use of --skip-broken-bitmaps requires --bitmaps")
        if request.bitmaps:
            if len(self.disks) > 1:
                raise InvalidArgument("Copying bitmaps only possible with single source")
            copying.check_bitmaps(self._active, skip_broken=request.skip_broken_bitmaps)
        if request.snapshots:
            from cowhand.copy.ops.convert_snapshots import check_history

            check_history(self.disks[0], request, self.settings)

    def prepare(self, registry: Registry | None, policy: OpenPolicy | None) -> None:
        """Decide on the new image, if there is to be one, and on what is read of the sources; nothing is written yet."""
        if not self.request.skip_create:
            self._creation = _creation(self.request, self.size, registry, policy)
            self._has_backing = "backing_file" in self._creation.options
            _check_creation(self.settings, self._creation, len(self.disks))
        # What a source's own layer does not allocate is left to the target's backing file.
        depth = 1 if self._has_backing else None
        if self.settings.salvage:
            self._source = SalvagingSource(self.disks, depth=depth, report=self._note, unknown=self._note_status)
        else:
            self._source = Source(self.disks, depth=depth)

    def _note(self, offset: int, error: CowhandError) -> None:
        self._unreadable.add(offset, error)
        if self.request.like_qemu:
            self._warn(f"error while reading offset {offset}: {error.qemu()}")

    def _note_status(self, offset: int, error: CowhandError) -> None:
        if self.request.like_qemu:
            self._warn(f"error while reading block status at offset {offset}: {error.qemu()}")

    def open_target(self, policy: OpenPolicy | None, guard: Guard | None, *, force: bool) -> Target:
        """Return the target open for writing: the new image, under its temporary name, or the existing one."""
        request, creation, cache = self.request, self._creation, self.request.cache
        if not request.like_qemu:
            for written in self._written():
                refuse_own_source(self.disks, written)
        discard = self.settings.sparse_size > 0
        if creation is None:
            return existing_target(
                request.target,
                request.target_format,
                cache=cache,
                policy=policy,
                discard=discard,
                force=force,
                guard=guard,
            )
        from cowhand.copy.ops.space import look_for_space

        look_for_space(self._source, creation, self.settings, in_place=request.like_qemu, warn=self._warn)
        try:
            return create_target(
                creation,
                overwrite=request.overwrite,
                cache=cache,
                policy=policy,
                discard=discard,
                like_qemu=request.like_qemu,
                warn=self._warn,
                force=force,
                guard=guard,
            )
        except CowhandError as error:
            raise error.within(qemu=f"{creation.filename}: error while converting {creation.format.name}") from None

    def _written(self) -> list[str | None]:
        """Return the names of what is written: the target, and its data file."""
        if self._creation is None:
            target = self.request.target
            return [local_path(os.fspath(target))] if isinstance(target, (str, os.PathLike)) else []
        data = self._creation.options.get("data_file")
        return [self._creation.local, local_path(data) if data else None]

    def copy(self, target: Target, progress: Progress | None, cancel: CancelToken | None) -> ConvertResult:
        """Fill *target*; return what that was."""
        request = self.request
        if request.bitmaps:
            copying.check_target(target.disk)
        check_room(target.disk, self._source.size)
        if self._creation is None:
            self._look_for_room(target.disk, cancel)
        move = self._copy_states if request.snapshots else self._copy_content
        moved = move(target, progress, cancel)
        if request.bitmaps:
            skip_broken = request.skip_broken_bitmaps
            copying.copy_bitmaps(self._active, target.disk, skip_broken=skip_broken, warn=self._warn)
        name = self._creation.filename if self._creation is not None else target.disk.filename
        lost = self._unreadable
        return ConvertResult(
            name,
            target.disk.format,
            self.size,
            moved.data,
            moved.zero,
            moved.skip,
            lost.ranges(self._source.size),
            lost.reason,
        )

    def _look_for_room(self, disk: Disk, cancel: CancelToken | None) -> None:
        """Raise NoSpace where what is to be written into an existing image certainly does not fit; warn where it may not."""
        from cowhand.copy.ops.room import holding_data, require, room_for

        settings = self.settings
        policy = plan.Policy(zeroes_are_data=settings.sparse_size == 0)
        most = plan.totals(self._source.runs(policy)).data
        room = room_for(disk, lambda: self._source.runs(policy), most)
        if room is None:
            return
        if settings.sparse_size and not settings.compressed and not settings.salvage:
            # Zeroes are left out: only reading tells how much there is beside them.
            unit = disk.root.allocation_unit if isinstance(disk.root, FormatNode) else SECTOR * 8
            room = room_for(disk, lambda: holding_data(self._source, self._source.runs(policy), unit, cancel), most)
        if room is not None:
            certain = room.certain and not settings.compressed and not settings.salvage
            require(room._replace(certain=certain), disk.filename, "what is to be copied", warn=self._warn)

    def _copy_content(self, target: Target, progress: Progress | None, cancel: CancelToken | None) -> plan.Totals:
        return transfer(
            self._source,
            target,
            self.settings,
            has_backing=self._has_backing,
            reads_zero=self.request.target_is_zero and self._keeps_promise(target.disk),
            progress=progress,
            cancel=cancel,
        )

    def _keeps_promise(self, disk: Disk) -> bool:
        """Tell whether *disk* may be taken to read as zeroes; where not, they are written. Unchecked the user's word counts, as in QEMU."""
        from cowhand.copy.ops.zero_promise import broken_promise

        if self.request.like_qemu:
            return disk.root.zero_when_new
        why = broken_promise(disk)
        if why is not None:
            self._warn(f"'{disk.filename}' was said to read as zeroes, and {why}: zeroes are written")
        return why is None

    def _copy_states(self, target: Target, progress: Progress | None, cancel: CancelToken | None) -> plan.Totals:
        """The same with every internal snapshot before it."""
        from cowhand.copy.ops.convert_snapshots import copy_history

        def first(state: Disk, part: Progress) -> plan.Totals:
            return transfer(Source([state]), target, self.settings, progress=part, cancel=cancel)

        moved, _ = copy_history(self.disks[0], target.disk, self.settings, first, progress=progress, cancel=cancel)
        return moved


def _creation(request: Request, size: int, registry: Registry | None, policy: OpenPolicy | None) -> Creation:
    from cowhand.image.create import prepare

    if isinstance(request.target, Mapping):
        raise InvalidArgument(
            "a target given as a description must exist already (use it with -n)",
            qemu="--target-image-opts requires use of -n flag",
        )
    options = {name: value for name, value in request.options.items() if name != "size"}
    if options.get("backing_file") is not None and options.get("backing_fmt") is None:
        if request.backing_format is None:
            raise InvalidArgument("Use of backing file requires explicit backing format")
    return prepare(
        request.target,
        request.target_format or "raw",
        size,
        options,
        backing=request.backing,
        backing_format=request.backing_format,
        registry=registry,
        policy=policy,
    )


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


__all__ = ["DEFAULT_SPARSE", "ConvertResult", "can_compress", "convert"]

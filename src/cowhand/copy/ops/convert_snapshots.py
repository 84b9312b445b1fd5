"""Copying a disk with its internal snapshots: every state in turn, oldest first in the table's order, and of each what differs from the one before.

What two states of the source store at the same place is known to be alike without being read. So the copy shares between its snapshots what the
source shares, and more: what is equal byte for byte is stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.block.format_io.format_node import FormatNode
from cowhand.copy.engine import plan
from cowhand.copy.engine.engine import Engine
from cowhand.copy.engine.plan import Run
from cowhand.copy.engine.source import Source
from cowhand.copy.ops.rebase_diff import Files, changes_sink, same_place
from cowhand.copy.ops.settings import throttle_for, workers_for
from cowhand.core.buffers import is_zero
from cowhand.core.errors import InvalidArgument, NotSupported
from cowhand.core.extents import COMPRESSED, ZERO, Extent
from cowhand.core.progress import CancelToken, Progress
from cowhand.image.snapshots import create_snapshot, list_snapshots, open_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from cowhand.block.disk import Disk
    from cowhand.block.node.records import SnapshotInfo
    from cowhand.copy.ops.settings import Request, Settings

#: Bytes of VM state that are copied at once.
_PIECE = 1 << 20


def check_history(source: Disk, request: Request, settings: Settings) -> None:
    """Raise where the snapshots of *source* cannot go along: InvalidArgument naming the first thing that is asked for and contradicts that,
    or NotSupported."""
    for contradiction, name in (
        (request.skip_create, "an existing target"),
        (len(request.inputs) > 1, "several sources"),
        (request.snapshot is not None, "the choice of one snapshot"),
        (request.backing is not None or "backing_file" in request.options, "a backing file of the target"),
        (request.options.get("data_file"), "a data file of the target"),
        (settings.salvage, "salvaging"),
        (settings.sparse_size == 0, "a sparse size of 0"),
    ):
        if contradiction:
            raise InvalidArgument(f"snapshots are not copied together with {name}")
    list_snapshots(source)  # raises where the format has none
    if request.target_format != "qcow2":
        raise NotSupported(f"format '{request.target_format or 'raw'}' has no internal snapshots", hint="Choose qcow2.")


class _Part(Progress):
    """Counts one state's work into the progress of all; ``behind`` are the bytes that follow it."""

    def __init__(self, whole: Progress, behind: int) -> None:
        super().__init__()
        self._whole, self._behind, self._before = whole, behind, whole.done

    def advance(self, count: int) -> None:
        super().advance(count)
        self._whole.total = self._before + self.total + self._behind
        self._whole.advance(count)


def copy_history(
    source: Disk,
    target: Disk,
    settings: Settings,
    first: Callable[[Disk, Progress], plan.Totals],
    *,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> tuple[plan.Totals, list[SnapshotInfo]]:
    """Give *target*, a new and empty disk, all snapshots of *source* and then its present content; return the bytes moved and the snapshots.

    *first* copies a whole disk to the target: the first state. Ids, names, dates, sizes, clocks and VM states are those of the source.
    Raises NotSupported, InvalidFormat, NoSpace, IOFailed, Cancelled.
    """
    progress = progress or Progress()
    infos = list_snapshots(source)
    amounts = [plan.totals(differing(old, new, 1)).data for old, new in _pairs(source, infos) if old is not None]
    moved = [0, 0, 0]
    for index, (old, new) in enumerate(_pairs(source, infos)):
        if target.size != new.size:
            target.resize(new.size, shrink=True, force=True)
        part = _Part(progress, sum(amounts[index:]))
        totals = first(new, part) if old is None else _copy_changes(old, new, target, settings, part, cancel)
        moved = [one + other for one, other in zip(moved, totals, strict=True)]
        if index < len(infos):
            _keep(new, target, infos[index], cancel)
    progress.finish()
    return plan.Totals(*moved), infos


def _pairs(source: Disk, infos: Sequence[SnapshotInfo]) -> Iterator[tuple[Disk | None, Disk]]:
    """Yield (the state before, the state) of each snapshot and of the present, with no more open than these two."""
    old = None
    try:
        for info in infos:
            new = open_snapshot(source, info)
            try:
                yield old, new
            except BaseException:
                new.close()
                raise
            if old is not None:
                old.close()
            old = new
        yield old, source
    finally:
        if old is not None:
            old.close()


def _copy_changes(
    old: Disk, new: Disk, target: Disk, settings: Settings, progress: Progress, cancel: CancelToken | None
) -> plan.Totals:
    sink = changes_sink(target, old, compressed=settings.compressed)
    unit = max(sink.unit, 512)
    totals = plan.totals(differing(old, new, unit))
    progress.total = totals.data
    if totals.data:
        sink.expect(totals.data)
        engine = Engine(
            Source([new]),
            sink,
            workers=workers_for(settings),
            progress=progress,
            cancel=cancel,
            throttle=throttle_for(settings),
        )
        engine.run(differing(old, new, unit))
    return plan.Totals(sink.copied, sink.zeroes, 0)


def _keep(state: Disk, target: Disk, info: SnapshotInfo, cancel: CancelToken | None) -> None:
    """Make the snapshot *info* in *target*, whose content is that of *state*; the VM state goes with it."""
    if info.vm_state_size:
        state.read_vmstate(
            info.vm_state_size - 1, 1
        )  # a state that cannot be that long is refused before any of it is copied
    for offset in range(0, info.vm_state_size, _PIECE):
        if cancel is not None:
            cancel.check()
        piece = state.read_vmstate(offset, min(_PIECE, info.vm_state_size - offset))
        if not is_zero(piece):
            target.write_vmstate(offset, piece)
    create_snapshot(
        target,
        info.name,
        ident=info.id,
        date=(info.date_sec, info.date_nsec),
        vm_state_size=info.vm_state_size,
        vm_clock_nsec=info.vm_clock_nsec,
        icount=info.icount,
    )


def differing(old: Disk, new: Disk, unit: int) -> Iterator[Run]:
    """Yield runs of whole *unit* of *new*: DATA where it may read otherwise than *old* (which reads as zeroes behind its end), else SKIP."""
    size = -(-new.size // 512) * 512
    return plan.joined(plan.rounded(_rows(old, new), unit, size))


def _rows(old: Disk, new: Disk) -> Iterator[Run]:
    files = Files()
    others = _extents(old)
    other = next(others, None)
    for row in _extents(new):
        position = row.start
        while position < row.end:
            while other is not None and other.end <= position:
                other = next(others, None)
            end = row.end if other is None else min(row.end, other.end)
            if other is not None and other.flags & row.flags & COMPRESSED and not other.depth | row.depth:
                yield from _compressed(old, new, position, end)
            else:
                same = bool(row.flags & ZERO) if other is None or other.flags & ZERO else same_place(row, other, files)
                yield Run(position, end - position, plan.SKIP if same else plan.DATA)
            position = end


def _compressed(old: Disk, new: Disk, begin: int, end: int) -> Iterator[Run]:
    """Yield runs of what both store compressed: alike where both name the same compressed bytes."""
    left, right = old.root, new.root
    if not isinstance(left, FormatNode) or not isinstance(right, FormatNode):
        yield Run(begin, end - begin, plan.DATA)
        return
    while begin < end:
        first = left.map(begin, end - begin)
        second = right.map(begin, end - begin)
        length = min(first[0], second[0])
        same = first[3] == second[3] and bool(first[1] & second[1] & COMPRESSED)
        yield Run(begin, length, plan.SKIP if same else plan.DATA)
        begin += length


def _extents(disk: Disk) -> Iterator[Extent]:
    for batch in disk.extents():
        yield from batch

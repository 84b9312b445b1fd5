"""Moving one source into one open target: the plan, the sink that fits, shared blocks where that is possible, the engine."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from cowhand.copy.engine import plan
from cowhand.copy.engine.engine import Engine
from cowhand.copy.engine.plan import Policy
from cowhand.copy.engine.source import Source
from cowhand.copy.ops.settings import DEFAULT_SPARSE, Settings, throttle_for, workers_for
from cowhand.copy.ops.target import Target
from cowhand.core.errors import NoSpace
from cowhand.core.malloc_tuning import expect_bulk
from cowhand.core.progress import CancelToken, Progress

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.copy.engine.clone import Cloner
    from cowhand.copy.engine.sink import Sink

#: Runs of a plan that are kept from the sum to the work; of more, the source is asked twice.
_KEPT = 1 << 16


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
    the target reads as zeroes; a new one without a backing file does anyway. *progress* counts bytes, *cancel* ends it. Neither end is closed.
    Raises NoSpace with a hint of what would help, IOFailed, Cancelled.
    """
    progress = progress or Progress()
    fresh = target.is_new and settings.sparse_size > 0 and not has_backing and target.disk.root.zero_when_new
    sink = _sink(target.disk, settings, reads_zero=reads_zero or fresh)
    below = target.disk.root.backing if has_backing and target.is_new else None
    policy = Policy(
        # Over a backing file nothing shall be copied that shows through; and what the source knows of holes counts where few zeroes would be found.
        unit=sink.part if has_backing or sink.grain > DEFAULT_SPARSE else sink.unit,
        skip_unallocated=has_backing,
        skip_zero_from=below.node.size if below is not None else None,
        zeroes_are_data=settings.sparse_size == 0,
    )
    runs = list(islice(source.runs(policy), _KEPT + 1)) if source.joins else []
    known = 0 < len(runs) <= _KEPT
    totals = plan.totals(runs if known else source.runs(policy))
    progress.total = totals.data + (0 if sink.reads_zero else totals.zero)
    sink.expect(totals.data)
    expect_bulk(totals.data)
    engine = Engine(
        source,
        sink,
        workers=workers_for(settings),
        in_order=settings.in_order,
        progress=progress,
        cancel=cancel,
        throttle=throttle_for(settings),
        cloner=_cloner(source, sink, settings),
    )
    try:
        engine.run(runs if known else source.runs(policy))
    except NoSpace as error:
        from cowhand.copy.ops.space import explain

        error.hint = explain(target.disk, progress) or error.hint
        raise
    progress.finish()
    return totals


def _cloner(source: Source, sink: Sink, settings: Settings) -> Cloner | None:
    """Return what shares blocks instead of copying bytes; None where every byte is to be looked at or to be stored in another form."""
    wanted = settings.reflink or settings.copy_range
    if not wanted or settings.compressed or settings.salvage or not settings.sparse_size:
        return None
    from cowhand.copy.engine.clone import Cloner

    return Cloner(source, sink, copying=settings.copy_range)


def _sink(disk: Disk, settings: Settings, *, reads_zero: bool) -> Sink:
    if settings.compressed:
        from cowhand.copy.engine.compressed_sink import choose_compressed

        return choose_compressed(
            disk, sparse=settings.sparse_size, reads_zero=reads_zero, level=settings.compression_level
        )
    from cowhand.copy.engine.sink import choose

    return choose(disk, sparse=settings.sparse_size, reads_zero=reads_zero)

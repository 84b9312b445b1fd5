"""Committing: what the layers above a base hold goes down into it; then the top, which says nothing new any more, is emptied.

Order makes it safe. The base is written and flushed while the layers above still hold everything, so a reader of the top sees the same bytes at
any moment, and after a crash at any point: the commit is simply begun anew. Only then is the top emptied.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block import graph
from cowhand.block.disk import Disk
from cowhand.block.format import FormatNode
from cowhand.block.node import BlockNode
from cowhand.block.reserving import Kind
from cowhand.block.status import skip_filters
from cowhand.copy import plan
from cowhand.copy.engine import WORKERS, Engine
from cowhand.copy.plan import Policy
from cowhand.copy.sink import choose
from cowhand.copy.source import Source
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported
from cowhand.core.progress import CancelToken, Progress
from cowhand.core.units import parse_size

if TYPE_CHECKING:
    from cowhand.block.policy import Policy as OpenPolicy

#: Bytes that are emptied at once, so that cancelling does not wait long.
_EMPTY_PIECE = 1 << 30


class CommitResult(NamedTuple):
    """What a commit did: where to, bytes copied and made zero there, whether the base grew, whether the top is empty now."""

    base: str
    copied: int
    zeroes: int
    grown: bool
    emptied: bool


class _Layer(NamedTuple):
    filename: str
    driver: str


def commit(
    top: str | os.PathLike[str],
    base: str | None = None,
    *,
    format: str | None = None,
    drop: bool = False,
    rate_limit: int | str = 0,
    cache: str = "writeback",
    policy: OpenPolicy | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
    warn: Callable[[str], None] | None = None,
) -> CommitResult:
    """Copy what *top*, and every layer between, allocates into *base* (default: *top*'s backing file), which grows to *top*'s size.

    Then *top* is emptied, so that the base shows through; with *drop* (-d), and whenever *base* is named (-b), it is left as it is and may be
    deleted. Layers between stay in any case, but no longer mean what they did. Everything is opened and checked before the first byte is
    written. *cancel* leaves a base that holds a part of the data and a top that still holds all: nothing that a reader of *top* sees has
    changed. Other overlays of *base* become invalid, which this function cannot know: ``cowhand.chain`` can. Raises CowhandError.
    """
    rate = parse_size(rate_limit)
    drop = drop or base is not None
    with ExitStack() as stack:
        chain, disk_top, disk_base = _open(os.fspath(top), format, base, cache, policy, stack, empty=not drop)
        size_before = disk_base.size
        grown = disk_top.size > size_before
        if grown:
            _check_growth(disk_base)
            disk_base.resize(disk_top.size)
        moved = _copy(disk_top, disk_base, size_before, len(chain) - 1, rate, progress or Progress(), cancel)
        disk_base.flush()
        emptied = not drop and _empty(disk_top, cancel or CancelToken(), warn)
        return CommitResult(disk_base.filename, moved.data, moved.zero, grown, emptied)


def _open(
    top: str,
    format: str | None,
    base: str | None,
    cache: str,
    policy: OpenPolicy | None,
    stack: ExitStack,
    *,
    empty: bool,
) -> tuple[list[_Layer], Disk, Disk]:
    """Return the layers from top to base, and disks of both, open for writing (the top only when it is to be emptied).

    The chain is read once to learn what it is made of, then opened from the base up: one node for the base, for the layer above and for us.
    """
    import cowhand
    from cowhand.block.opening import Opening
    from cowhand.block.options import CACHE_MODES
    from cowhand.block.policy import DEFAULT
    from cowhand.drivers import REGISTRY

    with cowhand.open(top, format=format, cache=cache, policy=policy) as look:
        chain = _layers(look.root, top, base)
    _, direct, no_flush = CACHE_MODES[cache]
    switches: dict[str, Any] = {"cache.direct": direct, "cache.no-flush": no_flush}
    lowest = chain[-1]
    disk_base = stack.enter_context(
        cowhand.open(
            lowest.filename,
            writable=True,
            format=lowest.driver,
            cache=cache,
            policy=policy,
            options={"discard": "unmap"},
        )
    )
    below: BlockNode = disk_base.root
    for layer in reversed(chain[:-1]):
        is_top = layer is chain[0]
        opening = Opening(REGISTRY, policy or DEFAULT)
        options = {"read-only": not (is_top and empty), "discard": "unmap", "backing": below, **switches}
        try:
            below = opening.open(layer.filename, format=layer.driver, options=options)
        except CowhandError as error:
            raise error.within(f"layer '{layer.filename}'") from None
    try:
        disk_top = Disk(below, writable=empty, resizable=False)
    except BaseException:
        if not below.parents and not below.closed:
            graph.close_node(below)
        raise
    return chain, stack.enter_context(disk_top), disk_base


def _layers(root: BlockNode, top: str, base: str | None) -> list[_Layer]:
    """Return what lies from *root* down to *base* (None: the first backing file), both included; raises InvalidArgument."""
    node = skip_filters(root)
    layers = [_Layer(node.filename, node.driver)]
    while True:
        below = node.backing
        if below is None:
            if base is None:
                raise InvalidArgument("Image does not have a backing file", path=top)
            raise InvalidArgument(f"Did not find '{base}' in the backing chain of '{top}'", hint=_known(layers))
        reference = node.filename
        node = skip_filters(below.node)
        layers.append(_Layer(node.filename, node.driver))
        if base is None or _names(base, node.filename, reference):
            return layers


def _names(given: str, filename: str, above: str) -> bool:
    """Tell whether *given* means the layer *filename*: by its name, relative to the layer *above* as in a header, or the same file."""
    from cowhand.block.opening import has_protocol

    if given == filename:
        return True
    for candidate in (given, os.path.join(os.path.dirname(above), given)):
        try:
            if not has_protocol(candidate) and os.path.samefile(candidate, filename):
                return True
        except OSError:
            continue
    return False


def _known(layers: list[_Layer]) -> str:
    below = ", ".join(layer.filename for layer in layers[1:])
    return f"It has: {below}" if below else "It has no backing file."


def _check_growth(disk: Disk) -> None:
    if not disk.root.capabilities.resizable:
        raise NotSupported(
            f"'{disk.filename}' is smaller than the image above it and cannot grow",
            path=disk.filename,
            hint="Make the base larger first, or commit into another copy of it.",
        )


def _copy(
    top: Disk,
    base: Disk,
    size_before: int,
    layers: int,
    rate: int,
    progress: Progress,
    cancel: CancelToken | None,
) -> plan.Totals:
    """Copy what the upper *layers* allocate into *base*, *size_before* bytes of which are older than this commit; return the bytes of each kind."""
    # Zeroes that a layer knows of are made zero in the base. In data they are not looked for: it was written there once on purpose.
    sink = choose(base, sparse=0, reads_zero=False)
    policy = Policy(unit=sink.unit, skip_unallocated=True, skip_zero_from=size_before)
    source = Source([top], depth=layers)
    totals = plan.totals(source.runs(policy))
    progress.total = totals.data + totals.zero
    throttle = None
    if rate:
        from cowhand.copy.throttle import Throttle

        throttle = Throttle(rate)
    engine = Engine(source, sink, workers=WORKERS, progress=progress, cancel=cancel, throttle=throttle)
    engine.run(source.runs(policy))
    progress.finish()
    return totals


def _empty(disk: Disk, cancel: CancelToken, warn: Callable[[str], None] | None) -> bool:
    """Let the base show through everywhere; False where the format cannot say so."""
    node = disk.root
    if not isinstance(node, FormatNode):
        return False
    unit = node.allocation_unit
    end = -(-disk.size // unit) * unit
    try:
        with graph.quiesce(node):
            for offset in range(0, end, _EMPTY_PIECE):
                cancel.check()
                node.change(offset, min(_EMPTY_PIECE, end - offset), Kind.EMPTY)
    except NotSupported as error:
        if warn is not None:
            warn(f"'{disk.filename}' could not be emptied: {error.message}")
        return False
    disk.flush()
    return True

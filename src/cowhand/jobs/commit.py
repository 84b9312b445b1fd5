"""Committing: what the layers above a base hold goes down into it; then the top, which says nothing new any more, is emptied.

Order makes it safe. The base is written and flushed while the layers above still hold everything, so a reader of the top sees the same bytes at
any moment, and after a crash at any point: the commit is simply begun anew. Only then is the top emptied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind
from cowhand.block.graph import graph
from cowhand.block.graph.block_status import skip_filters
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.filenames import has_protocol, location
from cowhand.copy.engine import plan
from cowhand.copy.engine.engine import WORKERS, Engine
from cowhand.copy.engine.plan import Policy
from cowhand.copy.engine.sink import choose
from cowhand.copy.engine.source import SECTOR, Source
from cowhand.copy.ops.room import Room, require as require_room, room_for
from cowhand.core.errors import InvalidArgument, NotSupported
from cowhand.core.progress import CancelToken, Progress
from cowhand.core.units import parse_size

if TYPE_CHECKING:
    from cowhand.block.node.guard import Change, Guard
    from cowhand.block.opening.policy import Policy as OpenPolicy

#: Bytes that are emptied at once, so that cancelling does not wait long.
_EMPTY_PIECE = 1 << 30


class CommitResult(NamedTuple):
    """What a commit did: where to, bytes copied and made zero there, whether the base grew, whether the top is empty now."""

    base: str
    copied: int
    zeroes: int
    grown: bool
    emptied: bool


class Layers:
    """A chain open for a commit: the disks of its top and of its base, and how many layers lie above the base. Close it, or use ``with``."""

    def __init__(self, top: Disk, base: Disk | None, above: int) -> None:
        self.top = top
        self._base = base
        self.above = above

    @property
    def base(self) -> Disk:
        """What is written; raises InvalidArgument where the top has no backing file."""
        if self._base is None:
            raise InvalidArgument("Image does not have a backing file", path=self.top.filename)
        return self._base

    def find(self, base: str, *, as_in_header: bool = False) -> int:
        """Return how many layers lie above the one called *base*, the name in a header or the same file; raises InvalidArgument.

        A relative name is relative to the image above the layer, as in that image's header, and else (not *as_in_header*) to where we are.
        """
        node = skip_filters(self.top.root)
        known: list[str] = []
        while (below := node.backing) is not None:
            layer = skip_filters(below.node)
            known.append(layer.filename)
            if _names(base, layer, node, as_in_header):
                return len(known)
            node = layer
        hint = f"It has: {', '.join(known)}" if known else "It has no backing file."
        name = self.top.filename
        raise InvalidArgument(f"Did not find '{base}' in the backing chain of '{name}'", hint=hint, path=name)

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both disks, and the chain."""
        with ExitStack() as stack:
            stack.callback(self.top.close)
            if self._base is not None:
                stack.callback(self._base.close)


def commit(
    top: str | os.PathLike[str] | Mapping[str, Any],
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
    force: bool = False,
    guard: Guard | None = None,
) -> CommitResult:
    """Copy what *top*, and every layer between, allocates into *base* (default: *top*'s backing file), which grows to *top*'s size.

    Then *top* is emptied, so that the base shows through; with *drop* (-d), and whenever *base* is named (-b), it is left as it is and may be
    deleted. Layers between stay in any case, but no longer mean what they did. Everything is opened and checked before the first byte is
    written. *cancel* leaves a base that holds a part of the data and a top that still holds all: nothing that a reader of *top* sees has
    changed.

    *guard* refuses (OverlaysExist, SearchIncomplete) what would change what other images show, layers between among them, or internal snapshots of
    *top* and of these; *force* overrides it. ``cowhand.commit`` always has one. Raises CowhandError.
    """
    drop = drop or base is not None
    layers = open_layers(top, format=format, cache=cache, policy=policy, writable=not drop)
    try:
        above = 1 if base is None else layers.find(base)
        if above != layers.above:
            layers.close()
            layers = open_layers(top, above, format=format, cache=cache, policy=policy, writable=not drop)
        if guard is not None:
            guard.refuse(change_of(layers.top.root, layers.above), force=force)
        require_room(room_of(layers), layers.base.filename, "what is to be committed", warn=warn)
        moved, grown = copy_down(layers, rate_limit=rate_limit, progress=progress, cancel=cancel)
        emptied = not drop and empty(layers.top, cancel, warn)
        return CommitResult(layers.base.filename, moved.data, moved.zero, grown, emptied)
    finally:
        layers.close()


def change_of(top: BlockNode, above: int) -> Change:
    """Return what committing the *above* layers from *top* on changes for others: the base, and so all layers between, not what *top* shows.

    Raises InvalidArgument where there are not so many layers.
    """
    from cowhand.block.node.guard import Change, files_of
    from cowhand.image.kept_states import states_over

    nodes = [skip_filters(top)]
    for _ in range(above):
        below = nodes[-1].backing
        if below is None:
            raise InvalidArgument("Image does not have a backing file", path=nodes[-1].filename)
        nodes.append(skip_filters(below.node))
    files = [path for node in reversed(nodes[1:]) for path in files_of(node)]
    states = [state for node in nodes[:-1] for state in states_over(node)]
    return Change(
        f"committing into '{nodes[-1].filename}'",
        tuple(files),
        (*files_of(nodes[0]), *files_of(nodes[-1])),
        tuple(states),
    )


def open_layers(
    top: str | os.PathLike[str] | Mapping[str, Any],
    above: int = 1,
    *,
    format: str | None = None,
    cache: str = "writeback",
    policy: OpenPolicy | None = None,
    writable: bool = True,
) -> Layers:
    """Open *top*, also for writing if it is *writable*, and the layer that has *above* others above it for writing. Raises CowhandError.

    It is one graph, opened once as *top* describes it: filters and options between the layers stay where they are.
    """
    from cowhand.block.node.options import cache_switches
    from cowhand.block.opening.opening import Opening
    from cowhand.block.opening.policy import DEFAULT
    from cowhand.drivers import REGISTRY

    write_through, direct, no_flush = cache_switches(cache)
    options: dict[str, Any] = {"cache.direct": direct, "cache.no-flush": no_flush}
    opening = Opening(REGISTRY, policy or DEFAULT)
    opening.writable_layer = above
    root = opening.open(top, format=format, options={"read-only": not writable, "discard": "unmap", **options})
    try:
        disk = Disk(root, writable=writable, resizable=False, write_through=write_through)
    except BaseException:
        opening.abandon()
        raise
    try:
        node = _layer(disk.root, above)
        base = None if node is None else Disk(node, writable=True, write_through=write_through)
    except BaseException:
        disk.close()
        raise
    return Layers(disk, base, above)


def room_of(layers: Layers) -> Room | None:
    """Return the room for what lies above the base in it, None where it is enough, or nothing is known. Nothing is changed."""
    base = layers.base
    source = Source([layers.top], depth=layers.above, exact=True)
    unit = base.root.allocation_unit if isinstance(base.root, FormatNode) else 1

    def runs() -> Iterator[plan.Run]:
        return source.runs(Policy(unit=unit, skip_unallocated=True, skip_zero_from=base.size))

    return room_for(base, runs, plan.totals(runs()).data)


def look_for_room(
    top: str | os.PathLike[str] | Mapping[str, Any],
    above: int = 1,
    *,
    format: str | None = None,
    policy: OpenPolicy | None = None,
) -> Room | None:
    """Return what :func:`room_of` tells of a chain that is opened for reading only. Raises CowhandError."""
    from cowhand.image.open import open_image

    with open_image(top, format=format, policy=policy) as disk:
        node = _layer(disk.root, above)
        if node is None:
            return None
        with Disk(node) as base:
            return room_of(Layers(disk, base, above))


def copy_down(
    layers: Layers,
    *,
    rate_limit: int | str = 0,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> tuple[plan.Totals, bool]:
    """Write what lies above the base into it, stable on return; return the bytes of each kind, and whether the base grew. Raises CowhandError."""
    rate = parse_size(rate_limit)
    top, base = layers.top, layers.base
    Source([top], depth=layers.above, exact=True).require_whole()
    size_before = base.size
    grown = top.size > size_before
    if grown:
        _check_growth(base)
        base.resize(-(-top.size // SECTOR) * SECTOR)
    moved = _copy(top, base, size_before, layers.above, rate, progress or Progress(), cancel)
    base.flush()
    return moved, grown


def _layer(root: BlockNode, above: int) -> BlockNode | None:
    node = skip_filters(root)
    for _ in range(above):
        below = node.backing
        if below is None:
            return None
        node = skip_filters(below.node)
    return node


def _names(given: str, layer: BlockNode, above: BlockNode, as_in_header: bool) -> bool:
    """Tell whether *given* means *layer*, which lies under *above*."""
    if above.backing_link is not None and given == above.backing_link[0]:
        return True
    candidates = [os.path.join(os.path.dirname(location(above)), given)]
    if not as_in_header:
        candidates.append(given)
    for candidate in candidates:
        try:
            if candidate == layer.filename:
                return True
            if not has_protocol(candidate) and os.path.samefile(candidate, layer.filename):
                return True
        except OSError:
            continue
    return False


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
    policy = Policy(unit=sink.part, skip_unallocated=True, skip_zero_from=size_before)
    source = Source([top], depth=layers, exact=True)
    totals = plan.totals(source.runs(policy))
    progress.total = totals.data + totals.zero
    sink.expect(totals.data, flushed=not base.root.options.cache_no_flush)
    throttle = None
    if rate:
        from cowhand.copy.engine.throttle import Throttle

        throttle = Throttle(rate)
    engine = Engine(source, sink, workers=WORKERS, progress=progress, cancel=cancel, throttle=throttle)
    engine.run(source.runs(policy))
    progress.finish()
    return totals


def empty(disk: Disk, cancel: CancelToken | None = None, warn: Callable[[str], None] | None = None) -> bool:
    """Let the base show through everywhere in *disk*; False, and *warn* is told, where the format cannot say so. Raises CowhandError."""
    cancel = cancel or CancelToken()
    node = skip_filters(disk.root)
    if not isinstance(node, FormatNode):
        return False
    unit = node.allocation_unit
    end = -(-disk.size // unit) * unit
    try:
        with graph.quiesce(node):
            if node.make_empty():
                return True
            for offset in range(0, end, _EMPTY_PIECE):
                cancel.check()
                node.change(offset, min(_EMPTY_PIECE, end - offset), Kind.EMPTY)
    except NotSupported as error:
        if warn is not None:
            warn(f"'{disk.filename}' could not be emptied: {error.message}")
        return False
    disk.flush()
    return True

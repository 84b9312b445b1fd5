"""Rebasing: an image is given another backing file, and goes on showing what it showed.

Order makes it safe. What the new backing file would show differently is copied into the image while the old one is still its backing file, so its
content is the same at every moment; when that is stable the name in the header changes, inside one sector. After a crash at any point
the rebase is simply begun anew.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.block.graph.block_status import skip_filters
from cowhand.block.links.reading import is_broken, local_targets, read_links, refuse_loop
from cowhand.block.links.records import BACKING, Link
from cowhand.block.opening.filenames import combine, location
from cowhand.copy.engine import plan
from cowhand.copy.engine.engine import WORKERS, Engine
from cowhand.copy.engine.source import Source
from cowhand.copy.ops.rebase_diff import candidates, changes_sink
from cowhand.core.errors import CowhandError, NotSupported
from cowhand.core.identity import identify
from cowhand.core.progress import CancelToken, Progress
from cowhand.drivers import REGISTRY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cowhand.block.node.guard import Change, Guard
    from cowhand.block.node.node import BlockNode
    from cowhand.block.opening.policy import Policy


class RebaseResult(NamedTuple):
    """What a rebase did: the name and format that stand in the header now (None: no backing file), and bytes read to compare, copied, made zero."""

    filename: str
    backing: str | None
    backing_format: str | None
    compared: int
    copied: int
    zeroes: int


class Changes(NamedTuple):
    """Bytes that were read to be compared, those that were copied, and those that were made zero."""

    compared: int
    copied: int
    zeroes: int


def rebase(
    top: str | os.PathLike[str] | Mapping[str, Any] | Disk,
    backing: str | None,
    backing_format: str | None = None,
    *,
    format: str | None = None,
    unsafe: bool = False,
    look: bool = False,
    compressed: bool = False,
    cache: str = "writeback",
    source_cache: str = "writeback",
    force_share: bool = False,
    policy: Policy | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
    warn: Callable[[str], None] | None = None,
    force: bool = False,
    guard: Guard | None = None,
) -> RebaseResult:
    """Make *backing* (a name as it is to stand in the header; None or "": nothing) the backing file of *top*, whose content stays the same.

    *top* may be an open, writable disk. With *unsafe* (-u) only the header changes: the user knows that both hold the same, or that the old one
    is gone. With *look* everything is compared and counted, and nothing is changed. *compressed* (-c) stores what is copied in compressed
    clusters. *force_share* (-U) reads the new backing file although others may be writing it. *cancel* leaves *top* on its old backing file, with
    a part of the data in it. What is to be copied has to fit: NoSpace is raised before anything is changed, or *warn* hears that it may not.

    Never makes a loop: ChainLoop is raised, also with *unsafe* and with *force*, when *backing* is *top* itself or reads through it. *guard* refuses
    (OverlaysExist, SearchIncomplete) what would change what others show: internal snapshots of *top*, and with *unsafe* images that read through it;
    *force* overrides it. ``cowhand.rebase`` always has one. Raises CowhandError; *top* shows the same content then.
    """
    from cowhand.image.open import open_image

    name = backing or None
    with ExitStack() as stack:
        if isinstance(top, Disk):
            disk = top
        else:
            disk = stack.enter_context(
                open_image(
                    top,
                    writable=not look,
                    format=format,
                    backing=not unsafe,
                    cache=cache,
                    policy=policy,
                    resizable=False,
                )
            )
        root = skip_filters(disk.root)
        change = getattr(root, "change_backing", None)
        if change is None:
            raise NotSupported(
                f"format '{root.driver}' has no backing files", qemu="Operation not supported", path=disk.filename
            )
        if name is not None:
            refuse_loop(location(disk.root), Link(BACKING, name, backing_format), REGISTRY, force=force)
        if guard is not None and not look:
            guard.refuse(change_of(disk, name, backing_format, unsafe=unsafe), force=force)
        changes = Changes(0, 0, 0)
        if not unsafe:
            changes = copy_changes(
                disk,
                name,
                backing_format,
                look=look,
                compressed=compressed,
                cache=source_cache,
                force_share=force_share,
                policy=policy,
                progress=progress,
                cancel=cancel,
                look_for_room=True,
                warn=warn,
            )
        if not look:
            change(name, backing_format)
        return RebaseResult(disk.filename, name, backing_format if name else None, *changes)


def change_of(disk: Disk, backing: str | None, format: str | None = None, *, unsafe: bool = False) -> Change:
    """Return what rebasing *disk* changes for others; nothing where it shows the same over the new name, or can show nothing now."""
    from cowhand.block.node.guard import Change, files_of
    from cowhand.image.kept_states import states_over

    root = skip_filters(disk.root)
    doing = f"another backing file of '{disk.filename}'"
    if _shows_the_same(root, backing, format):
        return Change(doing)
    # With a comparison the image itself goes on showing the same; its snapshots are not compared.
    files = files_of(root) if unsafe else ()
    renamed = (location(root), backing) if backing else None
    return Change(doing, files, files, tuple(states_over(root)), renamed)


def _shows_the_same(root: BlockNode, backing: str | None, format: str | None) -> bool:
    """Tell whether *root* shows over *backing*, a name as in a header, what it shows now; so does what can show nothing now."""
    path = location(root)
    if identify(path) is None:
        return False
    if is_broken(path, REGISTRY):
        return True
    links = [link for link in read_links(path, REGISTRY).links if link.role == BACKING]
    old = [_meaning(path, link) for link in links]
    new = [] if not backing else [_meaning(path, Link(BACKING, backing, format))]
    return old == new and None not in old


def _meaning(path: str, link: Link) -> tuple[Any, str] | None:
    """Return which file *link* means and in which format it is read; None where that cannot be told."""
    targets = local_targets(path, link)
    identity = identify(targets[0]) if len(targets) == 1 else None
    if identity is None:
        return None
    try:
        return identity, link.format or read_links(targets[0], REGISTRY).format
    except (CowhandError, OSError):
        return None


def copy_changes(
    disk: Disk,
    backing: str | None,
    format: str | None = None,
    *,
    look: bool = False,
    compressed: bool = False,
    as_bytes: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    policy: Policy | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
    look_for_room: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Changes:
    """Store in *disk*, stable on return, what would read otherwise over *backing*: the first half of a rebase.

    Arguments as for :func:`rebase`; with *as_bytes* what has become zero is stored as data, as QEMU does.
    """
    with ExitStack() as stack:
        below = _open_below(disk, backing, format, cache, force_share, policy, stack)
        if look_for_room and not look:
            _require_room(disk, below, cancel, compressed=compressed, as_bytes=as_bytes, warn=warn)
        sink = changes_sink(disk, below, compressed=compressed, look=look, as_bytes=as_bytes)
        compared = _copy(disk, below, sink, progress or Progress(), cancel)
        if not look:
            disk.flush()
        return Changes(compared, sink.copied, sink.zeroes)


def _require_room(
    disk: Disk,
    below: Disk | None,
    cancel: CancelToken | None,
    *,
    compressed: bool,
    as_bytes: bool,
    warn: Callable[[str], None] | None,
) -> None:
    """Raise NoSpace where what is to be copied does not fit. Where all that may differ would not, it is compared, to know."""
    from cowhand.copy.ops.room import require, room_for

    sink = changes_sink(disk, below, look=True, as_bytes=as_bytes)
    unit = max(sink.unit, 512)

    def runs() -> Iterator[plan.Run]:
        return candidates(disk, below, unit)

    room = room_for(disk, runs, plan.totals(runs()).data)
    if room is not None:
        _copy(disk, below, sink, Progress(), cancel)
        # Of what does not differ nothing is stored; compressed clusters take less than is known before.
        room = room._replace(needed=min(room.needed, sink.copied), certain=room.certain and not compressed)
        require(room, disk.filename, "what is to be copied", warn=warn)


def _open_below(
    disk: Disk,
    name: str | None,
    format: str | None,
    cache: str,
    force_share: bool,
    policy: Policy | None,
    stack: ExitStack,
) -> Disk | None:
    if name is None:
        return None
    from cowhand.image.open import open_image

    path = combine(location(disk.root), name)
    try:
        return stack.enter_context(open_image(path, format=format, cache=cache, force_share=force_share, policy=policy))
    except CowhandError as error:
        raise error.within("the new backing file", qemu=f"Could not open new backing file '{name}'") from None


def _copy(disk: Disk, below: Disk | None, sink: Any, progress: Progress, cancel: CancelToken | None) -> int:
    """Copy what differs; return how many bytes had to be looked at."""
    unit = max(sink.unit, 512)
    total = plan.totals(candidates(disk, below, unit)).data
    progress.total = total
    if total:
        sink.expect(total, flushed=not disk.root.options.cache_no_flush)
        # Each piece is planned before it is written, and no piece changes what a later one is planned from.
        engine = Engine(Source([disk]), sink, workers=WORKERS, progress=progress, cancel=cancel)
        engine.run(candidates(disk, below, unit))
    progress.finish()
    return total

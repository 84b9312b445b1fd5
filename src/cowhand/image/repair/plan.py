"""Repairs that say first what they would do, and that can be undone.

The repair is done to a rehearsal of the image; what it wrote there is the plan. For a repair in earnest the old content of all this goes into
an undo log, and when the log is stable the same writes are done to the image, in the same order and with the same flushes: a crash in
the middle leaves what it would have left of a repair without a log.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.block.node.records import CheckResult
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported
from cowhand.image.check import REPAIRS, check_node
from cowhand.image.repair.undo_log import UndoLog, note, open_file, play, write_log
from cowhand.image.shadow.recording import RehearsalNode

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.block.node.records import Finding, Say

_MOST_NAMED = 4096


class PlannedWrite(NamedTuple):
    """Bytes ``[offset, offset + length)`` of the file that a repair would write; ``what`` lies there now."""

    offset: int
    length: int
    what: str


class RepairPlan(NamedTuple):
    """What a repair would do. ``result`` is what the check after it would say; ``size`` the file's length afterwards."""

    result: CheckResult
    writes: tuple[PlannedWrite, ...]
    size_before: int
    size: int


def plan_repair(path: str, repair: str, *, format: str | None = None, on_finding: Say | None = None) -> RepairPlan:
    """Try out what *repair* ("leaks", "all") would do to the image at *path*; nothing is written. Raises what a check raises."""
    from cowhand.image.open import open_image

    driver = "host_device" if not os.path.isfile(path) and os.path.exists(path) else "file"
    with open_image({"driver": driver, "filename": path}) as disk:
        rehearsal = RehearsalNode(disk.root)
        with Disk(rehearsal):
            result = rehearse(rehearsal, repair, format, on_finding)
            result.filename = path
            found = list(rehearsal.written())
            with _opened(disk.root, format, writable=False) as image:
                writes = tuple(_named(image.root, found))
            return RepairPlan(result, writes, disk.size, rehearsal.size)


def explain(path: str, findings: Iterable[Finding], *, format: str | None = None) -> dict[int, list[str]]:
    """Return {host cluster: what refers to it} for every cluster that the *findings* of a check speak of, rising. Raises what opening raises."""
    from cowhand.image.open import open_image

    driver = "host_device" if not os.path.isfile(path) and os.path.exists(path) else "file"
    asked = sorted({finding.cluster for finding in findings if finding.cluster is not None})
    with (
        open_image({"driver": driver, "filename": path}, force_share=True) as disk,
        _opened(disk.root, format, writable=False) as image,
    ):
        owners: dict[int, list[str]] = _owning(image.root).owners(asked)
        return owners


def repair_logged(
    path: str, repair: str, log: str, *, format: str | None = None, on_finding: Say | None = None
) -> tuple[CheckResult, bool]:
    """Repair the image at *path* after its undo log was written to the new file *log*; return the result and whether anything was changed.

    Without anything to change no log is made. Raises what a check raises, and ImageExists, IOFailed, NoSpace for the log, with the image untouched.
    """
    with open_file(path) as disk:
        rehearsal = RehearsalNode(disk.root)
        keeper = None
        try:
            keeper = Disk(rehearsal)
            result = rehearse(rehearsal, repair, format, on_finding)
            result.filename = path
            if not rehearsal.changed:
                return result, False
            write_log(log, disk, path, rehearsal)
            play(disk, rehearsal)
        finally:
            if keeper is not None:
                keeper.close()
    note(log, f"done {os.stat(path).st_mtime_ns}")
    return result, True


def undo_repair(log: str, path: str, *, force: bool = False, dry_run: bool = False) -> bool:
    """Undo the repair of the image at *path* that *log* tells of; False when the image is as it was before the repair already.

    Raises ImageChanged, and nothing is written, when the image is not as the repair left it (whole, or interrupted), and UndoLogUsed when the log did
    its work already; *force* only says that the file's time does not matter. With *dry_run* all of that is found out, and nothing is written. A
    crash in the middle does no harm: do it again.
    """
    undo = UndoLog(log)
    undo.check_unused()
    with open_file(path) as disk:
        modified = os.stat(path).st_mtime_ns if os.path.isfile(path) else None
        found = undo.verify(disk, modified, force=force)
        if dry_run:
            return found
        if found:
            note(log, "undoing")
            undo.apply(disk)
    if found or "undoing" in undo.notes:  # a crash may have come between the last byte and the note
        note(log, "undone")
    return found


def _opened(file: BlockNode, format: str | None, *, writable: bool) -> Disk:
    """Open the image in *file* as check and repair do, without what lies under it."""
    from cowhand.block.opening.opening import Opening
    from cowhand.drivers import REGISTRY

    opening = Opening(REGISTRY, backing=False)
    opening.for_repair = True
    description = {"driver": format} if format else {}
    root = opening.open({**description, "file": file, "read-only": not writable})
    try:
        return Disk(root, writable=writable)
    except BaseException:
        opening.abandon()
        raise


def rehearse(
    rehearsal: RehearsalNode, repair: str, format: str | None = None, on_finding: Say | None = None
) -> CheckResult:
    """Repair the image that *rehearsal* shows; what was written is kept there. Raises what a check raises."""
    if repair not in REPAIRS or repair is None:
        raise InvalidArgument(f"'{repair}' is not a repair", hint="One of: leaks, all.")
    disk = _opened(rehearsal, format, writable=True)
    failure = None
    try:
        result = check_node(disk.root, repair=repair, on_finding=on_finding)
        failure = result.failure
    finally:
        try:
            disk.close()
        except CowhandError:
            if failure is None:
                raise  # else the repair stopped on its way, and said why
    return result


def _owning(root: BlockNode) -> Any:
    if not hasattr(root, "owners"):
        raise NotSupported(f"the structure is not known of images of format '{root.driver}'", path=root.filename)
    return root


def _named(root: BlockNode, ranges: list[tuple[int, int]]) -> Iterator[PlannedWrite]:
    """Yield the *ranges* of the file with what lies there, cut where that changes."""
    node = _owning(root)
    size = node.cluster_size
    asked = islice((c for begin, end in ranges for c in range(begin // size, -(-end // size))), _MOST_NAMED)
    names = node.owners(asked)
    for begin, end in ranges:
        while begin < end:
            cluster = begin // size
            stop = min(end, (cluster + 1) * size)
            owners = names.get(cluster)
            what = "not looked up" if owners is None else ", ".join(owners) or "free space"
            yield PlannedWrite(begin, stop - begin, what)
            begin = stop

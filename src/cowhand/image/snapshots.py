"""Internal snapshots: those that an image keeps inside itself. The same functions for every format that has them.

All but :func:`list_snapshots` and :func:`open_snapshot` hold the requests of other users back while they work, and are stable when they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowhand.block.graph import graph
from cowhand.core.errors import BitmapUnusable, InvalidArgument, ReadOnly, SnapshotNotFound

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.guard import Guard
    from cowhand.block.node.node import BlockNode
    from cowhand.block.node.records import SnapshotInfo


def _holder(disk: Disk) -> BlockNode:
    """Return the node that keeps *disk*'s snapshots: the first below it that is no filter."""
    node = disk.root
    while node.is_filter and node.primary is not None:
        node = node.primary.node
    return node


def _check_writable(disk: Disk) -> None:
    disk.check_open()
    if disk.read_only:
        raise ReadOnly(
            f"disk '{disk.name}' is open for reading only", path=disk.filename, hint="Open it with writable=True."
        )


def find_snapshot(disk: Disk, wanted: str | SnapshotInfo) -> SnapshotInfo:
    """Return the snapshot that *wanted* means, see :func:`choose`. Raises SnapshotNotFound, InvalidArgument, NotSupported."""
    return choose(list_snapshots(disk), wanted, disk.filename)


def choose(snapshots: Sequence[SnapshotInfo], wanted: str | SnapshotInfo, path: str) -> SnapshotInfo:
    """Return the one of *snapshots* that *wanted* means: a record, an id, a name, or ``snapshot.id=ID`` and ``snapshot.name=NAME``.

    Raises SnapshotNotFound, and InvalidArgument where a word means several: it is one's id and another's name, or the name of two.
    """
    if not isinstance(wanted, str):
        return wanted
    for prefix, attribute in (("snapshot.id=", "id"), ("snapshot.name=", "name")):
        if wanted.startswith(prefix) and not any(wanted in (one.id, one.name) for one in snapshots):
            word = wanted.removeprefix(prefix)
            return _only([one for one in snapshots if getattr(one, attribute) == word], snapshots, wanted, path)
    return _only([one for one in snapshots if wanted in (one.id, one.name)], snapshots, wanted, path)


def choose_as_qemu(snapshots: Sequence[SnapshotInfo], word: str, path: str) -> SnapshotInfo:
    """Return the one of *snapshots* with that id, or else the first with that name, as QEMU looks them up. Raises SnapshotNotFound."""
    found = [one for one in snapshots if one.id == word] or [one for one in snapshots if one.name == word]
    return found[0] if found else _only([], snapshots, word, path)


def _only(found: Sequence[SnapshotInfo], snapshots: Sequence[SnapshotInfo], word: str, path: str) -> SnapshotInfo:
    if not found:
        known = ", ".join(f"{one.id} ({one.name})" for one in snapshots[:10])
        raise SnapshotNotFound(
            f"there is no snapshot '{word}'", qemu="snapshot not found", path=path, hint=f"There are: {known}" if known else None
        )  # fmt: skip
    if len(found) > 1 and len({(one.id, one.name) for one in found}) > 1:
        several = " and ".join(f"the one with the id '{one.id}' and the name '{one.name}'" for one in found[:4])
        ways = dict.fromkeys(
            f"snapshot.{key}={value}"
            for one in found
            for key, value in (("id", one.id), ("name", one.name))
            if sum(getattr(other, key) == value for other in snapshots) == 1
        )
        raise InvalidArgument(
            f"'{word}' means {len(found)} snapshots: {several}", path=path,
            hint=f"Say which: {' or '.join(ways)}" if ways else "Nothing tells them apart.",
        )  # fmt: skip
    return found[0]


def list_snapshots(disk: Disk) -> list[SnapshotInfo]:
    """Return the snapshots that *disk*'s image keeps, in the order of its table. Raises NotSupported."""
    holder = _holder(disk)
    if holder.snapshots_problem is not None:
        raise holder.snapshots_problem
    return holder.list_snapshots()


def create_snapshot(
    disk: Disk,
    name: str,
    *,
    date: tuple[int, int] | None = None,
    vm_state_size: int = 0,
    vm_clock_nsec: int = 0,
    icount: int | None = None,
    ident: str | None = None,
) -> SnapshotInfo:
    """Keep the present content of *disk* as snapshot *name*, and return its record; names need not differ.

    *ident* is its id, the next free number if it is not given; one that another snapshot has raises InvalidArgument.
    *date* is (seconds, nanoseconds), now if it is not given. With *vm_state_size*, that many bytes of VM state, written before, go with the
    snapshot and are no longer part of the active disk. Raises NotSupported, ReadOnly, InvalidFormat when a reference count would overflow,
    NoSpace, IOFailed; then nothing has changed.
    """
    _check_writable(disk)
    node = _holder(disk)
    with graph.quiesce(node):
        return node.create_snapshot(
            name, date=date, vm_state_size=vm_state_size, vm_clock_nsec=vm_clock_nsec, icount=icount, ident=ident
        )


def refuse_bitmaps(disk: Disk) -> None:
    """Raise BitmapUnusable where *disk* has dirty bitmaps: going back to a snapshot would make them untrue."""
    if _holder(disk).dirty_bitmaps:
        raise BitmapUnusable(
            f"'{disk.filename}' has dirty bitmaps, which do not follow a snapshot",
            qemu="Device has active dirty bitmaps", path=disk.filename, errno=16, hint="Remove the bitmaps first.",
        )  # fmt: skip


def apply_snapshot(disk: Disk, wanted: str | SnapshotInfo, *, force: bool = False, guard: Guard | None = None) -> None:
    """Make the content, and the size, of *disk* what they were when the snapshot was made; what was written since is lost.

    The snapshot stays. To change what images show that read through this one is refused (OverlaysExist, SearchIncomplete) for a disk that
    ``cowhand.open`` gave, unless *force* is set; *guard* stands for the disk's own. Raises SnapshotNotFound, NotSupported, ReadOnly, InvalidFormat,
    NoSpace, IOFailed; then nothing has changed.
    """
    _check_writable(disk)
    node = _holder(disk)
    refuse_bitmaps(disk)
    chosen = choose(node.list_snapshots(), wanted, disk.filename)
    if guard is None and disk.guard is not None:
        guard = disk.guard()
    if guard is not None:
        from cowhand.block.node.guard import change_of

        guard.refuse(change_of(node, f"going back to a snapshot of '{disk.filename}'"), force=force)
    with graph.quiesce(node):
        try:
            node.apply_snapshot(chosen.id, chosen.name)
        finally:
            # What failed may have come as far as the new size.
            for above in graph.disks_above((node,)):
                above.root_changed()


def delete_snapshot(disk: Disk, wanted: str | SnapshotInfo) -> None:
    """Forget a snapshot and free what only it held. Raises as :func:`apply_snapshot`, and ImageInUse while the snapshot is being read."""
    _check_writable(disk)
    node = _holder(disk)
    chosen = choose(node.list_snapshots(), wanted, disk.filename)
    with graph.quiesce(node):
        node.delete_snapshot(chosen.id, chosen.name)


def open_snapshot(disk: Disk, wanted: str | SnapshotInfo) -> Disk:
    """Return a disk, for reading only, that shows *disk*'s content as the snapshot has it; *disk* itself may be in use meanwhile.

    The snapshot cannot be deleted through *disk* until the returned disk is closed. Raises SnapshotNotFound, NotSupported, InvalidFormat.
    """
    from cowhand.block.disk import Disk

    disk.check_open()
    node = _holder(disk)
    try:
        chosen = choose(node.list_snapshots(), wanted, disk.filename)
    except SnapshotNotFound:
        if node.snapshots_problem is not None:
            raise node.snapshots_problem from None
        raise
    view = node.open_snapshot(chosen.id, chosen.name)
    try:
        return Disk(view)
    except BaseException:
        graph.close_node(view)
        raise

"""Making, applying, deleting and reading snapshots of qcow2 (QEMU ``docs/interop/qcow2``, "Snapshots").

What makes a new state valid is one write inside the header's first sector. Before it, everything that the new state needs is stable; after it, what
only the old state needed is freed. So a crash leaves leaked clusters at worst, and an error before the switch is undone.

Making and deleting change counts and COPIED bits of many clusters, which cannot be done at once: meanwhile the dirty bit says that they do not fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from cowhand.block.format_io.reservations import Kind
from cowhand.block.format_io.table_cache import Table
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount import bulk_update as counting
from cowhand.block.formats.qcow2.refcount.copied_flag import cleared, fit_flags
from cowhand.block.formats.qcow2.snapshot.table import (
    NO_ICOUNT,
    REQUIRED_EXTRA,
    Snapshot,
    check_l1,
    encode_table,
    read_l1,
)
from cowhand.core import clock, diagnostics
from cowhand.core.errors import (
    CowhandError,
    ImageCorrupt,
    ImageInUse,
    InvalidArgument,
    InvalidFormat,
    NotSupported,
    SnapshotNotFound,
)
from cowhand.core.units import MAX_SIZE

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

_NAME_BYTES = 255  #: QEMU keeps names in 256 bytes
_SECTOR = 512


def find(node: Qcow2Node, ident: str | None, name: str | None) -> Snapshot:
    """Return the first snapshot with that id and name (None: any). Raises SnapshotNotFound."""
    for snapshot in node.snapshots:
        if (ident is None or snapshot.id == ident) and (name is None or snapshot.name == name):
            return snapshot
    if node.snapshots_problem is not None:
        raise node.snapshots_problem
    raise SnapshotNotFound(
        f"there is no snapshot '{name or ident}'", qemu="Can't find the snapshot", path=node.filename
    )


def _refuse_external(node: Qcow2Node) -> None:
    if node.header.incompatible & L.INCOMPAT_DATA_FILE:
        raise NotSupported(
            "an image with an external data file cannot have snapshots",
            qemu="Operation not supported",
            path=node.filename,
        )


@contextmanager
def _alone(node: Qcow2Node) -> Iterator[None]:
    """Hold everything; tables in memory are as on disk. What leaves this by another way than an error of ours poisons the node."""
    node.check_writable()
    with node.operation, _settled(node):
        yield


@contextmanager
def _settled(node: Qcow2Node) -> Iterator[None]:
    """Do the same for a caller that holds the operation lock."""
    node.flush()
    node.release_quarantine()
    with node.exclusive():
        try:
            node.write_back.run(locked=True)
            # Tables are changed on disk from here on, many more of them than a cache holds.
            node.mapping.cache.clear()
            yield
            _trust(node)
        except CowhandError:
            raise
        except BaseException as error:
            node.set_poison(error)
            raise
        finally:
            node.changed = True


def _trust(node: Qcow2Node) -> None:
    """Take the dirty bit away: what was asked is done and stable."""
    try:
        node.trust_counts()
    except CowhandError as error:
        # The next flush tries again, and fails where this one matters.
        diagnostics.report(f"qcow2: the dirty mark could not be taken away: {error.qemu()}")


def _take(node: Qcow2Node, data: bytes) -> tuple[int, int]:
    """Return (first cluster, clusters) of new room for *data*."""
    clusters = -(-len(data) // node.cluster_size)
    return (node.allocator.take(clusters) if clusters else 0), clusters


def _fill(node: Qcow2Node, cluster: int, data: bytes) -> None:
    if data:
        node.write_metadata(cluster * node.cluster_size, data + bytes(-len(data) % node.cluster_size))


class _Undo:
    """What is to be done when a step before the switch fails, newest first."""

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.steps: list[Callable[[], object]] = []

    def room(self, first: int, clusters: int) -> None:
        if clusters:
            self.steps.append(lambda: self.node.allocator.untake(first, clusters))

    def run(self) -> None:
        try:
            for step in reversed(self.steps):
                step()
        except CowhandError as error:
            # Told is the error that led here; this one left the counts in memory wrong.
            self.node.set_poison(error)


@contextmanager
def _undoing(node: Qcow2Node) -> Iterator[_Undo]:
    undo = _Undo(node)
    try:
        yield undo
    except CowhandError:
        if node.poison is None:
            undo.run()
        raise


def _switch_table(node: Qcow2Node, snapshots: list[Snapshot], cluster: int, data: bytes) -> None:
    """Make the table *data*, stable at *cluster*, the image's; the old one is freed in memory."""
    size, header = node.cluster_size, node.header
    old, old_bytes = header.snapshots_offset, node.snapshot_table_bytes
    node.switch_header(snapshot_count=len(snapshots), snapshots_offset=cluster * size if data else 0)
    node.snapshots, node.snapshot_table_bytes = snapshots, len(data)
    if old_bytes:
        _free(node, old // size, -(-old_bytes // size))


def store_table(node: Qcow2Node, snapshots: list[Snapshot]) -> None:
    """Write the table of *snapshots* to a new place and make it the image's. Everything is held by the caller."""
    data = encode_table(snapshots, path=node.filename)
    with _undoing(node) as undo:
        place = _take(node, data)
        undo.room(*place)
        _fill(node, place[0], data)
        node.write_back.run(locked=True)
        _switch_table(node, snapshots, place[0], data)
        undo.steps.clear()
    _end(node)


def complete_table(node: Qcow2Node) -> None:
    """Write the table anew where an entry lacks what version 3 demands of each ("Snapshots": extra data); version 2 images may have such ones.

    The caller holds the operation lock.
    """
    if any(snapshot.extra_size < REQUIRED_EXTRA for snapshot in node.snapshots):
        with _settled(node):
            store_table(node, node.snapshots)


def _free(node: Qcow2Node, first: int, clusters: int) -> None:
    """Free a table that nothing refers to any more, on disk and in memory. On a damaged image it leaks."""
    node.fire("cluster_free")
    try:
        node.refcounts.change(first, clusters, -1)
    except CowhandError as error:
        diagnostics.report(f"qcow2_free_clusters failed: {error.qemu()}")


def _end(node: Qcow2Node) -> None:
    """Bring what is left to the disk. The new state is valid already: an error here leaks clusters at worst."""
    try:
        node.rebuild_metadata_map()
    except CowhandError as error:
        error.facts["told"] = True  # closing has nothing to add
        raise
    node.write_back.run(locked=True)


# -- create


def create(
    node: Qcow2Node,
    name: str,
    *,
    date: tuple[int, int] | None = None,
    vm_state_size: int = 0,
    vm_clock_nsec: int = 0,
    icount: int | None = None,
    ident: str | None = None,
) -> Snapshot:
    """See :func:`cowhand.image.snapshots.create_snapshot`; nothing else uses the node meanwhile."""
    _refuse_external(node)
    if len(name.encode("utf-8", "surrogateescape")) > _NAME_BYTES or "\0" in name:
        raise InvalidArgument(
            f"a snapshot's name has at most {_NAME_BYTES} bytes, and none of them is zero", qemu="Invalid argument"
        )
    if ident is not None and (len(ident.encode("utf-8", "surrogateescape")) > _NAME_BYTES or "\0" in ident):
        raise InvalidArgument(f"a snapshot's id has at most {_NAME_BYTES} bytes, and none of them is zero")
    if ident is not None and any(snapshot.id == ident for snapshot in node.snapshots):
        raise InvalidArgument(f"there is a snapshot with the id '{ident}' already", path=node.filename)
    if len(node.snapshots) >= L.MAX_SNAPSHOTS:
        raise InvalidFormat(
            f"the image has {L.MAX_SNAPSHOTS} snapshots, the most that it can have", qemu="File too large", errno=27
        )
    if date is None:
        now = int(clock.now() * 1_000_000_000)
        date = (now // 10**9, now % 10**9)
    with _alone(node), _undoing(node) as undo:
        if ident is None:
            ident = next_id(node.snapshots)
        snapshot = Snapshot(
            ident, name, 0, node.header.l1_size, node.header.size, vm_state_size=vm_state_size, date_sec=date[0],
            date_nsec=date[1], vm_clock_nsec=vm_clock_nsec, icount=NO_ICOUNT if icount is None else icount,
        )  # fmt: skip
        _create(node, snapshot, undo)
    if vm_state_size:
        # In the active disk the state would only make the next snapshot dearer.
        length = -(-vm_state_size // node.cluster_size) * node.cluster_size
        node.change(node.vmstate_offset, length, Kind.EMPTY)
        node.flush()
    return snapshot


def next_id(snapshots: list[Snapshot]) -> str:
    """Return the id that QEMU gives a new snapshot: one more than the greatest number that an id begins with."""
    greatest = 0
    for snapshot in snapshots:
        digits = ""
        for character in snapshot.id.strip():
            if not "0" <= character <= "9":
                break
            digits += character
        greatest = max(greatest, int(digits or "0"))
    return str(greatest + 1)


def _create(node: Qcow2Node, snapshot: Snapshot, undo: _Undo) -> None:
    l1 = bytes(node.mapping.l1.data[: node.header.l1_size * L.ENTRY_SIZE])
    tally = counting.references(node, l1)
    try:
        counting.verify(node, tally, 1)  # raises before anything is changed
    except ImageCorrupt:
        if not node.refcounts.verification.end:
            raise
        node.refcounts.verification.require()
        counting.verify(node, tally, 1)
    size = node.cluster_size
    first, clusters = _take(node, l1)
    undo.room(first, clusters)
    snapshot.l1_offset = first * size
    snapshots = [*node.snapshots, snapshot]
    data = encode_table(snapshots, path=node.filename)
    place = _take(node, data)
    undo.room(*place)
    node.distrust_counts()
    counting.apply(node, tally, 1)
    undo.steps.append(partial(counting.apply, node, tally, -1))
    _fill(node, first, cleared(l1))
    _fill(node, place[0], data)
    # Shared from now on: whoever writes has to copy. Undone by fitting the bits to the counts again.
    undo.steps.insert(0, lambda: fit_flags(node, counting.PresentCounts(node, tally)))
    fit_flags(node, counting.PresentCounts(node, tally))
    node.write_back.run(locked=True)
    _switch_table(node, snapshots, place[0], data)
    undo.steps.clear()
    _end(node)


# -- delete


def delete(node: Qcow2Node, ident: str, name: str) -> None:
    """See :func:`cowhand.image.snapshots.delete_snapshot`; nothing else uses the node meanwhile."""
    _refuse_external(node)
    snapshot = find(node, ident, name)
    check_l1(node, snapshot)
    node.check_writable()
    with node.operation:
        if node.views.get(snapshot.l1_offset):
            raise ImageInUse(
                f"snapshot '{snapshot.name}' is being read",
                path=node.filename,
                hint="Close the disk that shows it first.",
            )
        with _settled(node):
            freed = _delete(node, snapshot)
    if node.options.discard == "unmap" and node.options.pass_discard_snapshot and node.file.node.capabilities.discard:
        _discard(node, freed)


def _delete(node: Qcow2Node, snapshot: Snapshot) -> list[tuple[int, int]]:
    node.refcounts.verification.require()
    with _undoing(node) as undo:
        tally = counting.references(node, read_l1(node, snapshot))
        counting.verify(node, tally, -1)  # on a damaged image: refuse before anything is changed
        # One of them: entries that are alike may be one object.
        place_in_table = node.snapshots.index(snapshot)
        snapshots = [*node.snapshots[:place_in_table], *node.snapshots[place_in_table + 1 :]]
        data = encode_table(snapshots, path=node.filename)
        place = _take(node, data)
        undo.room(*place)
        _fill(node, place[0], data)
        node.write_back.run(locked=True)
        node.distrust_counts()
        _switch_table(node, snapshots, place[0], data)
        undo.steps.clear()
    with _freeing(node):
        freed = counting.apply(node, tally, -1)
        size = node.cluster_size
        if snapshot.l1_size:
            _free(node, snapshot.l1_offset // size, -(-snapshot.l1_size * L.ENTRY_SIZE // size))
        # Before anything can fail: what was just freed may be taken by the next write.
        node.rebuild_metadata_map()
        # What is not shared any more can be written in place again.
        fit_flags(node, counting.PresentCounts(node, tally), keep=True)
        _end(node)
    return freed


@contextmanager
def _freeing(node: Qcow2Node) -> Iterator[None]:
    """Tell of an error while a deleted snapshot's clusters are freed: the snapshot is gone already, and on disk they stay counted."""
    try:
        yield
    except CowhandError as error:
        reason = os.strerror(error.number)
        diagnostics.report(f"qcow2_free_clusters failed: {reason}")
        # Counts in memory are lower than on disk, and bits may be both: nobody goes on from here.
        error.facts["told"] = True
        node.set_poison(error)
        error.qemu_message = f"Failed to free the cluster and L1 table: {reason}"
        raise


def _discard(node: Qcow2Node, freed: list[tuple[int, int]]) -> None:
    """Hand freed clusters back to the file system, but for those that have been taken again."""
    size = node.cluster_size
    with node.exclusive():
        for first, clusters in freed:
            try:
                # On a damaged image, counts may have called free what tables still refer to.
                damaged = node.metadata.hit(first, first + clusters - 1) is not None
                if not damaged and node.refcounts.find_free(first, clusters) == first:
                    node.file.discard(first * size, clusters * size)
            except CowhandError as error:
                diagnostics.report(f"discard of freed clusters failed: {error.qemu()}")
                return


# -- apply


def apply(node: Qcow2Node, ident: str, name: str) -> None:
    """See :func:`cowhand.image.snapshots.apply_snapshot`; nothing else uses the node meanwhile."""
    from cowhand.block.graph.graph import disks_above

    _refuse_external(node)
    snapshot = find(node, ident, name)
    check_l1(node, snapshot)
    if snapshot.disk_size > MAX_SIZE:
        raise InvalidFormat(
            f"a disk of {snapshot.disk_size} bytes is not possible", qemu="Image is too big", path=node.filename
        )
    if node.header.version < 3 and snapshot.disk_size != node.header.size:
        # A snapshot that does not say how large the disk was has the size that the disk has now: applying another one would change it.
        raise NotSupported("Can't resize a v2 image which has snapshots", path=node.filename)
    if any(disk.in_flight for disk in disks_above((node,))):
        raise InvalidArgument(
            "a snapshot cannot be applied inside a request or a lease of the same thread", path=node.filename
        )
    with _alone(node):
        _apply(node, snapshot)


def _new_l1(node: Qcow2Node, snapshot: Snapshot) -> bytes:
    """Return the L1 table that the disk gets: the snapshot's, as long as the disk needs it and never shorter than it was."""
    needed = -(-snapshot.disk_size >> node.mapping.table_shift)
    entries = max(needed, snapshot.l1_size, node.header.l1_size)
    if entries * L.ENTRY_SIZE > L.MAX_L1_BYTES:
        raise InvalidFormat(
            f"a disk of {snapshot.disk_size} bytes needs an L1 table of {entries} entries",
            qemu="File too large",
            path=node.filename,
            errno=27,
        )
    return cleared(read_l1(node, snapshot)).ljust(entries * L.ENTRY_SIZE, b"\0")


def _apply(node: Qcow2Node, snapshot: Snapshot) -> None:
    node.refcounts.verification.require()
    header, size = node.header, node.cluster_size
    old_l1 = bytes(node.mapping.l1.data[: header.l1_size * L.ENTRY_SIZE])
    old_place = (header.l1_offset // size, -(-len(old_l1) // size))
    l1 = _new_l1(node, snapshot)
    with _undoing(node) as undo:
        gained, lost = counting.references(node, l1), counting.references(node, old_l1)
        counting.verify(node, gained, 1)
        counting.verify(node, lost, -1)
        # A table inside one sector is overwritten at once or not at all; any other goes to a new place.
        in_place = len(l1) == len(old_l1) and len(l1) <= _SECTOR and snapshot.disk_size == header.size
        place = old_place if in_place else _take(node, l1)
        if not in_place:
            undo.room(*place)
            _fill(node, place[0], l1)
        counting.apply(node, gained, 1)
        undo.steps.append(partial(counting.apply, node, gained, -1))
        # Bits in a snapshot's tables need not be right, and now they are looked at: all that it refers to is shared with it.
        fit_flags(node, counting.PresentCounts(node, gained), l1, nothing_alone=True)
        node.write_back.run(locked=True)
        if in_place:
            node.switch(header.l1_offset, bytes(node.mapping.l1.data[: len(l1)]), l1)
        else:
            node.switch_header(size=snapshot.disk_size, l1_size=len(l1) // 8, l1_offset=place[0] * size)
        undo.steps.clear()
    node.mapping.l1 = Table(bytearray(l1), header.l1_offset)
    counting.apply(node, lost, -1)
    if not in_place:
        _free(node, *old_place)
    _end(node)

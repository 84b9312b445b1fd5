"""The qcow2 node (QEMU ``docs/interop/qcow2``): puts the rooms of this package together behind the format layer's interface."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping as Mapping_, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind, Reservation, Unprepared
from cowhand.block.formats.qcow2 import open as loading, overlap
from cowhand.block.formats.qcow2.cluster.mapping import Mapping
from cowhand.block.formats.qcow2.create import CREATE_OPTIONS, create, plan
from cowhand.block.formats.qcow2.metadata import cluster_sets
from cowhand.block.formats.qcow2.metadata.options import Qcow2Options
from cowhand.block.formats.qcow2.metadata.writer import MetadataNode
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount.refcounts import Refcounts
from cowhand.block.node.create_options import CreateOption
from cowhand.block.node.node import BlockNode, Child, Reopening, Request
from cowhand.block.node.options import NodeOptions
from cowhand.core import diagnostics
from cowhand.core.buffers import Buffer
from cowhand.core.errors import (
    CowhandError,
    ImageCorrupt,
    InvalidFormat,
    NotSupported,
    Poisoned,
)
from cowhand.core.extents import COMPRESSED, ENCODED, OFFSET

if TYPE_CHECKING:
    from cowhand.block.format_io.batch_rows import UnitWrites
    from cowhand.block.formats.qcow2.bitmap.directory import Directory
    from cowhand.block.formats.qcow2.cluster.compression import Codec
    from cowhand.block.formats.qcow2.cluster.encryption import Encryption
    from cowhand.block.formats.qcow2.references import References
    from cowhand.block.formats.qcow2.snapshot.table import Snapshot
    from cowhand.block.node.records import CheckResult, Say, SnapshotInfo
    from cowhand.block.opening.opening import Opening
    from cowhand.core.extents import ExtentBatch

#: Entries of compressed clusters at the end of the file that are remembered, so as not to look at each place of one again.
_MOST_AT_END = 1 << 16


#: Bytes behind the end of the file from which on a table is not one that a short file lacks.
_FAR = 1 << 20


class Qcow2Node(MetadataNode):
    """A qcow2 image, versions 2 and 3."""

    driver: ClassVar[str] = "qcow2"
    options_class: ClassVar[type[NodeOptions]] = Qcow2Options
    supports_backing: ClassVar[bool] = True
    takes_batches: ClassVar[bool] = True
    changeable: ClassVar[frozenset[str]] = frozenset(Qcow2Options.declared_options) - frozenset(
        NodeOptions.declared_options
    )
    create_options: ClassVar[tuple[CreateOption, ...]] = CREATE_OPTIONS

    cluster_size: int
    refcounts: Refcounts
    mapping: Mapping

    def __init__(self, options: Qcow2Options) -> None:
        super().__init__(options)
        self.snapshots: list[Snapshot] = []
        self.bitmap_directory: Directory
        self.bitmap_bytes_loaded = 0
        self.snapshot_table_bytes = 0
        self._preallocated: bool | None = None
        self.extended = False  #: clusters have subclusters
        self.views: dict[int, int] = {}  #: open views of snapshots, by the offset of their L1 table
        self.encryption: Encryption | None = None
        self._codec: Codec | None = None
        self._codec_lock = threading.Lock()

    # -- opening and making

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping_[str, Any]) -> None:
        """Make the open, writable, otherwise unused protocol node *file* an image of *size* bytes."""
        create(file, size, options)

    @classmethod
    def check_creation(cls, size: int, options: Mapping_[str, Any]) -> None:
        """Raise what is wrong with *options*, as far as that can be known without a file."""
        plan(size, options)

    @classmethod
    def measure(
        cls,
        options: Mapping_[str, Any],
        size: int | None,
        source_size: int | None,
        data_in_units: Callable[[int], int] | None,
    ) -> tuple[int, int, int]:
        """Return (required, fully allocated, cluster size) of a new image; see :func:`cowhand.block.formats.qcow2.measure.measure`."""
        from cowhand.block.formats.qcow2.measure import measure

        return measure(options, size, source_size, data_in_units)

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> Qcow2Node:
        assert isinstance(options, Qcow2Options)
        node = cls(options)
        loading.open_image(node, opening, given)
        return node

    def set_cache_limits(self) -> None:
        """Have the caches be as large as the options say."""
        options = self.options
        if options.l2_cache_size is not None or options.cache_size is not None:
            self.mapping.cache.limit = options.l2_cache_size or options.cache_size or self.mapping.cache.limit
        if options.refcount_cache_size is not None:
            self.refcounts.cache.limit = options.refcount_cache_size

    def prepare_reopen(self, options: NodeOptions, writable: bool) -> Reopening:
        from cowhand.block.formats.qcow2.reopening import Qcow2Reopening

        assert isinstance(options, Qcow2Options)
        return Qcow2Reopening(self, options, writable)

    def end_writing(self) -> None:
        """Forget that the image was prepared for changes, after everything reached the file: the next change prepares it again."""
        self.lazy = False
        self._writing = False

    @property
    def raw_data(self) -> bool:
        """Whether the data file has to read like the disk by itself."""
        return self.external and bool(self.header.autoclear & L.AUTOCLEAR_RAW_DATA)

    @property
    def metadata_preallocated(self) -> bool:
        """Whether data clusters may be holes of the file (preallocated metadata): found out when it is first asked."""
        if self._preallocated is None:
            from cowhand.block.formats.qcow2.cluster.preallocated import detect

            self._preallocated = detect(self)
        return self._preallocated

    # -- state

    @property
    def size(self) -> int:
        return self.header.size

    @property
    def in_use_for_writing(self) -> bool:
        """Whether tables in memory may be newer than those on disk."""
        return self._writing and self.poison is None

    def fire(self, event: str) -> None:
        """Tell a blkdebug node below that *event* (QEMU's name) is about to happen."""
        if self.event_sink is not None:
            self.event_sink(event)

    @property
    def codec(self) -> Codec:
        """The image's compression, made when it is first needed."""
        if self._codec is None:
            from cowhand.block.formats.qcow2.cluster.compression import codec

            with self._codec_lock:
                self._codec = codec(self.header.compression_type)
        return self._codec

    def forget_codec(self) -> None:
        """Make the compression anew when it is next needed: the header names another one now."""
        self._codec = None

    def set_compression_level(self, level: int | None) -> None:
        """Choose density over speed for what is compressed from now on (zlib 1 to 9, zstd 1 to 22); None is the default."""
        from cowhand.block.formats.qcow2.cluster.compression import codec

        self._codec = codec(self.header.compression_type, level)

    @property
    def backing_link(self) -> tuple[str, str | None] | None:
        name = self.header.backing_name
        return (name, self.header.backing_format) if name else None

    def format_specific(self) -> dict[str, Any]:
        from cowhand.block.formats.qcow2.info import describe

        return describe(self)

    def change_backing(self, name: str | None, format: str | None) -> None:
        """Record another backing file in the header (None: none any more); what is read changes with it, the content of clusters does not.

        The file is not looked at, and what is open stays open. Raises InvalidArgument when the header has no room.
        """
        from cowhand.block.formats.qcow2.amend.backing import change_backing

        with self.operation:
            change_backing(self, name, format)

    @classmethod
    def amend_options(cls) -> tuple[CreateOption, ...]:
        """Return what :meth:`amend` understands."""
        from cowhand.block.formats.qcow2.amend.amend import AMEND_OPTIONS

        return AMEND_OPTIONS

    def amend(
        self, options: Mapping_[str, Any], progress: Callable[[int, int], None] | None = None, *, force: bool = False
    ) -> None:
        """Change the image in place; see :func:`cowhand.block.formats.qcow2.amend.amend.amend`."""
        from cowhand.block.formats.qcow2.amend.amend import amend

        with self.operation:
            amend(self, options, progress, force=force)

    def references(self) -> References:
        """Count all that refers to clusters now; the allocation lock is held. What cannot be read or followed is told by the result."""
        from cowhand.block.formats.qcow2.references import References

        return References(self)

    def flush_counts(self) -> None:
        """Write the reference counts alone; takes the locks."""
        with self.exclusive():
            self.write_back.flush_refcounts()

    # -- reading

    def be_encrypted(self, encryption: Encryption | None) -> None:
        """Read and write data clusters through *encryption* from now on."""
        self.encryption = encryption
        if encryption is not None:
            self.encodes = True
            self.map = encryption.run  # type: ignore[method-assign]
            self.encode = encryption.encode  # type: ignore[method-assign]
            # Clusters that have a place without ever having been written hold what zeroes decrypt to.
            self.zero_when_new = not any(self.mapping.l1.data)

    def strong_options(self) -> dict[str, Any]:
        return {**super().strong_options(), **(self.encryption.strong if self.encryption is not None else {})}

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        return self.mapping.run(offset, length)

    def places(self, batch: Sequence[Request]) -> tuple[int, list[int]] | None:
        return self.mapping.places(batch) if self.encryption is None else None

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        if self.encryption is not None:
            from cowhand.block.formats.qcow2.cluster.encryption import without_places

            return without_places(self, self.mapping.batch(offset, length))
        return self.mapping.batch(offset, length)

    def units_at_end(self, offset: int, length: int) -> Iterable[int]:
        end, size, limit = offset + length, self.cluster_size, self.file.node.size
        seen: set[int] = set()
        while offset < end:
            count, flags, _, entry = self.mapping.run(offset, end - offset)
            if flags & COMPRESSED and entry not in seen:
                host, nbytes = L.compressed_location(entry, self.header.cluster_bits)
                if host + nbytes > limit:
                    if len(seen) < _MOST_AT_END:
                        seen.add(entry)
                    yield offset
            offset += count if not flags & COMPRESSED else size - offset % size

    def host_file(self, run: Any) -> tuple[int, int] | None:
        lane = self.data_child.lane
        if lane is None or lane.lane_fd < 0 or run[3] < 0 or self.encryption is not None:
            return None
        return lane.lane_fd, run[3]

    def decode(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        if run[1] & ENCODED:
            if self.encryption is not None and run[1] & OFFSET:
                self.encryption.decode(run, offset, view)
                return
            raise self.mapping.read_damaged(offset)
        host, nbytes = L.compressed_location(run[3], self.header.cluster_bits)
        if not self.cut_reads_as_zeroes:
            # Its last sector may end behind the file's end; what lies there is not filled up, since it might be taken for a part of the stream.
            nbytes = min(nbytes, self.file.node.size - host)
            if nbytes <= 0:
                from cowhand.block.formats.qcow2.cluster.mapping import lost_data

                raise lost_data(self.file, host, offset)
        payload = bytearray(nbytes)
        self.fire("read_compressed")
        self.file.read_into(host, payload)
        whole = view if len(view) == self.cluster_size else memoryview(bytearray(self.cluster_size))
        try:
            self.codec.decompress_into(payload, whole)
        except ImageCorrupt as error:
            error.path, error.offset = self.file.node.filename, host
            raise
        if whole is view:
            return
        begin = offset % self.cluster_size
        view[:] = whole[begin : begin + len(view)]

    def read_vmstate(self, offset: int, buffer: Buffer) -> None:
        reach = len(self.mapping.l1.data) // L.ENTRY_SIZE << self.mapping.table_shift
        if self.vmstate_offset + offset + len(buffer) > reach:
            raise InvalidFormat(
                f"the VM state ends before byte {offset + len(buffer)}: the tables reach no further", path=self.filename,
                hint="A VM state as long as the snapshot says is not in the image.",
            )  # fmt: skip
        FormatNode.read_into(self, self.vmstate_offset + offset, buffer)

    @property
    def vmstate_offset(self) -> int:
        """Guest offset at which the VM state begins: the first L2 table that the disk does not need."""
        shift = self.mapping.table_shift
        return -(-self.header.size >> shift) << shift

    # -- writing

    def begin_writing(self) -> None:
        self._refuse_far_tables()
        if not self.cut_reads_as_zeroes:
            from cowhand.block.formats.qcow2.references import require_whole

            require_whole(self)
        wanted = self.options.lazy_refcounts
        asked = bool(self.header.compatible & L.COMPAT_LAZY_REFCOUNTS) if wanted is None else wanted
        if asked and self.header.version >= 3:
            self.lazy = True
            self.set_incompatible(self.header.incompatible | L.INCOMPAT_DIRTY)
        wrong = overlap.conflict(self)
        if wrong is not None:
            raise self.overlapping(wrong[0], wrong[1] * self.cluster_size)
        self.clear_unknown_marks()
        self.rebuild_metadata_map()
        self.refcounts.verification.prepare()
        if self.bitmap_directory.present or self.bitmap_directory.outdated:
            from cowhand.block.formats.qcow2.bitmap.store import begin

            begin(self)

    def _refuse_far_tables(self) -> None:
        """Raise ImageCorrupt where a table that is written in place lies far behind the end of the file, which would become so long."""
        header, end = self.header, self.file.node.size + _FAR
        places = (
            ("L1 table", header.l1_offset, header.l1_size, L.OFFSET_L1_SIZE),
            ("refcount table", header.refcount_table_offset, header.refcount_table_clusters, L.OFFSET_REFCOUNT_TABLE),
        )
        for what, offset, count, at in places:
            # Without any counts every allocation is refused, in QEMU's words.
            if count and offset > end and not (self.like_qemu and what == "refcount table"):
                raise ImageCorrupt(
                    f"the {what} lies at {offset:#x}, behind the end of the file", qemu="Input/output error", path=self.filename, offset=at,
                    hint="Look at the image with check, then repair it.",
                )  # fmt: skip

    def rebuild_metadata_map(self) -> None:
        """Learn anew where this image's metadata lies (lock held). Where that fails, an image that is in use is not written any more."""
        try:
            fresh = overlap.build(self)
        except CowhandError as error:
            if self.begun:
                # What was freed would still count as metadata, and its next user as damage.
                self.set_poison(error)
            raise
        self.metadata = fresh
        self.unprotected = overlap.unknown(self) is not None
        self.metadata_clusters = cluster_sets.EVERY if self.unprotected else fresh.clusters

    def check_overlap(self, offset: int, length: int) -> None:
        """Raise ImageCorrupt, and mark the image so, when a write to host ``[offset, offset + length)`` would hit metadata."""
        bits = self.header.cluster_bits
        first, last = offset >> bits, (offset + length - 1) >> bits
        if self.unprotected:
            self.refuse_unprotected()
        if self.metadata.hit(first, last) is not None:
            raise self.overlapping(overlap.owner(self, first, last) or "metadata", offset)

    def refuse_unprotected(self) -> None:
        unknown = overlap.unknown(self)
        if unknown is not None:
            raise unknown

    def write_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        from cowhand.block.formats.qcow2.resize.grow import grow_l1

        position = self.vmstate_offset + offset
        length = sum(len(buffer) for buffer in buffers)
        self.check_writable()
        grow_l1(self, -(-(position + length) >> self.mapping.table_shift), exact=False)
        self.write(position, buffers)

    def reserve(self, offset: int, length: int, kind: Kind, nbytes: int = 0) -> Reservation | None:
        from cowhand.block.formats.qcow2.cluster import allocation

        self._make_room()
        return allocation.reserve(self, offset, length, kind, nbytes)

    def reserve_writes(self, writes: UnitWrites) -> None:
        from cowhand.block.formats.qcow2.cluster import batch_allocation

        self._make_room()
        batch_allocation.reserve(self, writes)

    def link_writes(self, writes: UnitWrites) -> None:
        writes.state.link(self, writes)

    def abandon_writes(self, writes: UnitWrites) -> None:
        writes.state.abandon(self)

    def spare(self, reservation: Reservation, begin: int, end: int) -> bool:
        if not self.extended:
            return False
        from cowhand.block.formats.qcow2.cluster import extended_allocation

        return extended_allocation.spare(self, reservation, begin, end)

    def _make_room(self) -> None:
        """Keep caches and quarantine within their limits; what needs a flush for that is done without the lock, and then begun again."""
        tables, allocator = self.mapping.cache, self.allocator
        self.refcounts.cache.trim()
        if tables.trim() and len(tables.dirty) * self.cluster_size > tables.limit // 2:
            raise Unprepared(self.write_back.flush)
        if allocator.crowded:
            raise Unprepared(self.write_back.flush)
        if allocator.ripe:
            raise Unprepared(self.release_quarantine)

    def change(self, offset: int, length: int, kind: Kind) -> None:
        if not self.external:
            super().change(offset, length, kind)
            return
        from cowhand.block.formats.qcow2.cluster.data_file import change

        change(self, offset, length, kind)

    def _zero_partial(self, offset: int, length: int, kind: Kind, fallback: bool) -> None:
        if not self.raw_data:
            super()._zero_partial(offset, length, kind, fallback)
            return
        if not fallback:
            raise NotSupported("a part of a cluster of a raw data file is zeroed by writing", path=self.filename)
        self._zero_bytes(offset, length)

    def link(self, reservation: Reservation) -> None:
        reservation.state.link(self)

    def abandon(self, reservation: Reservation) -> None:
        reservation.state.abandon(self)

    def flush(self) -> None:
        if not self.changed and not self.write_back.lock.locked():
            return
        if self.poison is not None:
            raise Poisoned(
                f"'{self.filename}' failed before: {self.poison.message}", path=self.filename, errno=self.poison.errno
            )
        self.fire("flush_to_os")
        self.write_back.flush()
        self.release_quarantine()

    def settle(self) -> None:
        # The flush frees what no request can reach any more; the second one makes that stable, so that nothing is left to be written.
        self.flush()
        self.flush()

    def release_quarantine(self, *, everything: bool = False) -> None:
        """Make clusters free whose last reference is gone from the disk and from every request; takes the lock."""
        with self.lock:
            ready = self.allocator.ready(everything=everything)
            known = self.refcounts.verification
            if any(part.discard and part.cluster < known.end for part in ready):
                known.run()  # what one count too low calls nobody's may be a snapshot's
        if not ready:
            return
        for part in ready:
            if part.discard:
                self._discard_host(part.cluster, part.clusters)
        with self.lock:
            self.allocator.release(ready)
            self.changed = True

    def _discard_host(self, cluster: int, count: int) -> None:
        # Only what nobody else refers to; the count cannot rise again while the clusters are in quarantine.
        if not self.file.node.capabilities.discard:
            return
        begin = None
        for number in range(cluster, cluster + count + 1):
            with self.lock:
                last = number < cluster + count and self.refcounts.get(number) == 1
                last = last and self.refcounts.verification.first_kept(number, 1) > 0
            if last and begin is None:
                begin = number
            elif not last and begin is not None:
                try:
                    self.file.discard(begin * self.cluster_size, (number - begin) * self.cluster_size)
                except CowhandError as error:
                    diagnostics.report(f"discard of freed clusters failed: {error.qemu()}")
                begin = None

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        from cowhand.block.formats.qcow2.resize.grow import resize

        with self.operation:
            resize(self, size, preallocation=preallocation, shrink=shrink)

    def unused_space(self, end: int) -> int | None:
        from cowhand.block.formats.qcow2.refcount.free_space import unused_space

        return None if self.external else unused_space(self, end)

    def tables_needed(self, ranges: Iterable[tuple[int, int]]) -> int:
        from cowhand.block.formats.qcow2.refcount.free_space import tables_needed

        return tables_needed(self, ranges)

    def make_empty(self) -> bool:
        from cowhand.block.formats.qcow2.resize.make_empty import make_empty

        return make_empty(self)

    def close(self) -> None:
        try:
            from cowhand.block.formats.qcow2.close import write_what_is_left

            write_what_is_left(self)
        finally:
            self._drop_tables()

    def _drop_tables(self) -> None:
        """Give memory back: nodes and edges name one another, so the collector may come late, and tables are large."""
        self.snapshots = []
        self.metadata = cluster_sets.MetadataMap()
        self.metadata_clusters = self.metadata.clusters
        if hasattr(self, "mapping"):
            self.mapping.cache.clear()
            self.mapping.l1.data = bytearray()
        if hasattr(self, "refcounts"):
            self.refcounts.cache.clear()
            self.refcounts.table = bytearray()

    # -- bitmaps, snapshots and checks

    def bitmap_keeper(self) -> Any:
        from cowhand.block.formats.qcow2.bitmap import store

        return store

    def snapshots_failure(self) -> CowhandError | None:
        from cowhand.block.formats.qcow2.snapshot.table import read_snapshots

        if self.snapshots_problem is not None:
            return self.snapshots_problem
        # Opened for a check, or to tell of it, an image is read without them.
        if self.snapshots or not self.header.snapshot_count:
            return None
        if self.header.snapshot_count > L.MAX_SNAPSHOTS:
            return InvalidFormat(
                f"{self.header.snapshot_count} snapshots are more than {L.MAX_SNAPSHOTS}", path=self.filename
            )
        try:
            read_snapshots(self, for_repair=False)
        except CowhandError as error:
            return error
        return None

    def list_snapshots(self) -> list[SnapshotInfo]:
        return [snapshot.info() for snapshot in self.snapshots]

    def create_snapshot(
        self,
        name: str,
        *,
        date: tuple[int, int] | None,
        vm_state_size: int,
        vm_clock_nsec: int,
        icount: int | None,
        ident: str | None,
    ) -> SnapshotInfo:
        from cowhand.block.formats.qcow2.snapshot.operations import create

        return create(
            self, name, date=date, vm_state_size=vm_state_size, vm_clock_nsec=vm_clock_nsec, icount=icount, ident=ident
        ).info()

    def apply_snapshot(self, ident: str, name: str) -> None:
        from cowhand.block.formats.qcow2.snapshot.operations import apply

        apply(self, ident, name)

    def delete_snapshot(self, ident: str, name: str) -> None:
        from cowhand.block.formats.qcow2.snapshot.operations import delete

        delete(self, ident, name)

    def open_snapshot(self, ident: str, name: str) -> BlockNode:
        from cowhand.block.formats.qcow2.snapshot_view import SnapshotView

        return SnapshotView.of(self, ident, name)

    def owners(self, clusters: Iterable[int]) -> dict[int, list[str]]:
        """Return {host cluster: what refers to it, in words}; see :mod:`cowhand.block.formats.qcow2.check.owners`."""
        from cowhand.block.formats.qcow2.check.owners import owners

        return owners(self, clusters)

    def check(self, repair: str | None, say: Say) -> CheckResult:
        from cowhand.block.formats.qcow2.check.check import check

        return check(self, repair, say)

"""What of a qcow2 file is metadata: so that nothing else is ever written there, whatever a damaged or hostile image claims.

QEMU's kinds and texts. QEMU looks at what it has cached; here everything that the tables tell of is known before the first write, also the tables
of snapshots (unless ``overlap-check`` names less), and an image whose own tables overlap one another is not written at all.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import CowhandError, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Bytes of snapshots' L1 tables that are read to protect what they name: 4,096 snapshots of a disk of 1 TiB. A table counts as 8 KiB at least.
MAX_INACTIVE_L1_BYTES = 64 << 20
_LEAST_L1_BYTES = 8 << 10
#: Entries of a table above which numpy, which takes 100 ms to import, finds the distinct ones faster.
_PLAIN_ENTRIES = 1 << 16
#: Clusters above which a sorted array replaces the set, whose elements take ten times the space.
_SET_LIMIT = 1 << 17
#: Clusters that are collected before they become part of the map.
_WAITING_LIMIT = 1 << 21

HEADER, ACTIVE_L1, REFCOUNT_TABLE, REFCOUNT_BLOCK = (
    "qcow2_header",
    "active L1 table",
    "refcount table",
    "refcount block",
)
SNAPSHOT_TABLE, INACTIVE_L1, INACTIVE_L2, ACTIVE_L2 = (
    "snapshot table",
    "inactive L1 table",
    "inactive L2 table",
    "active L2 table",
)
BITMAP_DIRECTORY = "bitmap directory"
ENCRYPTION_HEADER = "encryption header"
_OF_SNAPSHOTS = (INACTIVE_L1, INACTIVE_L2)


class ManyClusters:
    """Millions of cluster numbers in 8 bytes each, ascending. Changes are few, and kept beside."""

    def __init__(self, ordered: array[int]) -> None:
        self._ordered = ordered
        self._added: set[int] = set()
        self._removed: set[int] = set()

    def __contains__(self, cluster: object) -> bool:
        if cluster in self._added:
            return True
        if not isinstance(cluster, int) or cluster in self._removed:
            return False
        at = bisect_left(self._ordered, cluster)
        return at < len(self._ordered) and self._ordered[at] == cluster

    def __len__(self) -> int:
        return len(self._ordered) + len(self._added) - len(self._removed)

    def __iter__(self) -> Iterator[int]:
        yield from self._added
        for cluster in self._ordered:
            if cluster not in self._removed:
                yield cluster

    @property
    def ordered(self) -> array[int] | None:
        """All of them as one array, where nothing was changed."""
        return self._ordered if not self._added and not self._removed else None

    def below(self, end: int) -> Pool:
        """Return those that are smaller than *end*."""
        if self._added or self._removed:
            return {cluster for cluster in self if cluster < end}
        return ManyClusters(self._ordered[: bisect_left(self._ordered, end)])

    def update(self, clusters: Clusters) -> None:
        for cluster in clusters:
            self._removed.discard(cluster)
            if cluster not in self:
                self._added.add(cluster)

    def difference_update(self, clusters: Clusters) -> None:
        for cluster in clusters:
            self._added.discard(cluster)
            if cluster in self:
                self._removed.add(cluster)


#: Cluster numbers, in the form that suits how many they are.
Clusters: TypeAlias = "set[int] | range | ManyClusters"
Pool: TypeAlias = "set[int] | ManyClusters"


class _Every:
    """All clusters: where nothing may be written in place."""

    def __contains__(self, cluster: object) -> bool:
        return True


EVERY = _Every()


class Region(NamedTuple):
    """Metadata of one kind (QEMU's name) and the host clusters that it occupies.

    ``repeated``: a cluster that two entries of one table name and must not; ``alone``: those L2 tables that the COPIED flag says are referred to
    once; ``times``: how many entries of the active L1 table name an L2 table that they share.
    """

    name: str
    clusters: Clusters
    repeated: int | None = None
    alone: Clusters = range(0)
    times: Mapping[int, int] = MappingProxyType({})


class MetadataMap:
    """The host clusters that hold metadata. Changed with the allocation lock held; ``in`` needs no lock."""

    def __init__(self) -> None:
        self._clusters: Pool = set()
        self._kept: Pool = set()
        self._times: dict[int, int] = {}

    @property
    def clusters(self) -> Pool:
        """The set itself, for the one hot test: is this cluster metadata?"""
        return self._clusters

    def include(self, everything: Iterable[Region]) -> None:
        """Add all regions, before the map is used. What snapshots refer to stays when the active tables leave it."""
        waiting: list[Clusters] = []
        kept: list[Clusters] = []
        count = 0
        for region in everything:
            waiting.append(region.clusters)
            count += len(region.clusters)
            self._times.update(region.times)
            if region.name in _OF_SNAPSHOTS:
                kept.append(region.clusters)
            # Together, since each union sorts all that is there; not too many, since they are kept twice meanwhile.
            if count > _WAITING_LIMIT:
                self._clusters, self._kept = _united(self._clusters, waiting), _united(self._kept, kept)
                waiting, kept, count = [], [], 0
        self._clusters, self._kept = _united(self._clusters, waiting), _united(self._kept, kept)

    def add(self, first: int, count: int) -> None:
        """Add *count* clusters from *first* on."""
        self._clusters.update(range(first, first + count))

    def remove(self, first: int, count: int) -> None:
        """Take *count* clusters from *first* on away, but for those that snapshots, or other active entries, refer to as well."""
        if count == 1 and self._times.get(first, 1) > 1:
            self._times[first] -= 1
            return
        self._clusters.difference_update({c for c in range(first, first + count) if c not in self._kept})

    def hit(self, first: int, last: int) -> int | None:
        """Return a cluster in ``[first, last]`` that is metadata, or None."""
        return _common(range(first, last + 1), self._clusters)


def _united(one: Pool, others: list[Clusters]) -> Pool:
    """Return the union of all; *one* may be changed."""
    others = [other for other in others if other]
    if isinstance(one, set) and len(one) + sum(map(len, others)) <= _SET_LIMIT:
        one.update(*others)
        return one
    if not one and len(others) == 1 and isinstance(others[0], ManyClusters):
        return others[0]
    if not others:
        return one
    import numpy

    # In the memory that is kept: what four million clusters need is not needed twice.
    both = array("Q", bytes(8 * (len(one) + sum(map(len, others)))))
    column, at = numpy.frombuffer(both, "u8"), 0
    for part in (one, *others):
        column[at : at + len(part)] = _column(part)
        at += len(part)
    # Merging what is in order already; ranges, and most tables, are.
    column.sort(kind="stable")
    new = column[1:] != column[:-1]
    return ManyClusters(both if new.all() else _ascending(column[numpy.append(True, new)]))


def _ascending(column: Any) -> array[int]:
    out = array("Q")
    out.frombytes(memoryview(column).cast("B"))
    return out


def _column(clusters: Clusters) -> Any:
    """Return *clusters* as a numpy array."""
    import numpy

    if isinstance(clusters, ManyClusters) and clusters.ordered is not None:
        return numpy.frombuffer(clusters.ordered, "u8")
    if isinstance(clusters, range):
        return numpy.arange(clusters.start, clusters.stop, clusters.step, dtype="u8")
    return numpy.fromiter(clusters, "u8", len(clusters))


def _common(one: Clusters, other: Clusters) -> int | None:
    """Return a number that both contain, or None, by way of the smaller one."""
    if len(one) > len(other):
        one, other = other, one
    if isinstance(other, set) and other.isdisjoint(one):
        return None
    return next((cluster for cluster in one if cluster in other), None)


def _named(table: bytes | bytearray, mask: int, bits: int) -> tuple[Clusters, int | None]:
    """Return the clusters that a table's entries name, each once, and one that is named twice, if any."""
    unit = (1 << bits) - 1
    if len(table) > _PLAIN_ENTRIES * 8:
        return _many_named(table, mask, bits)
    words = array("Q", bytes(table[: len(table) // 8 * 8]))
    if sys.byteorder == "little":
        words.byteswap()
    # What is not aligned is named by nobody: following it is an error.
    named = [(word & mask) >> bits for word in words if word & mask and not word & mask & unit]
    distinct = set(named)
    if len(distinct) == len(named):
        return distinct, None
    left = set(distinct)
    for cluster in named:
        if cluster not in left:
            return distinct, cluster
        left.remove(cluster)
    raise AssertionError("a list that is longer than its set has no repetition")


def _many_named(table: bytes | bytearray, mask: int, bits: int) -> tuple[Clusters, int | None]:
    import numpy

    words = numpy.frombuffer(table, ">u8").astype("u8")
    words &= numpy.uint64(mask)
    words = words[(words & numpy.uint64((1 << bits) - 1) == 0) & (words != 0)] >> numpy.uint64(bits)
    words.sort(kind="stable")  # most are in order already
    equal = words[1:] == words[:-1]
    repeated = None
    if equal.any():
        repeated = int(words[1:][equal][0])
        words = numpy.concatenate((words[:1], words[1:][~equal]))
    return set(words.tolist()) if len(words) <= _SET_LIMIT else ManyClusters(_ascending(words)), repeated


def _alone(table: bytearray, bits: int) -> Clusters:
    """Return the L2 tables that the active L1 *table* names with the COPIED flag."""
    if len(table) <= _PLAIN_ENTRIES * 8:
        pairs = L.U64.iter_unpack(bytes(table[: len(table) // 8 * 8]))
        return {(word & L.L1_OFFSET_MASK) >> bits for (word,) in pairs if word & L.COPIED and word & L.L1_OFFSET_MASK}
    import numpy

    words = numpy.frombuffer(table, ">u8").astype("u8")
    words[words & numpy.uint64(L.COPIED) == 0] = 0
    return _many_named(words.astype(">u8").tobytes(), L.L1_OFFSET_MASK, bits)[0]


def span(node: Qcow2Node, offset: int, length: int) -> range:
    """Return the clusters of ``[offset, offset + length)``; none for what lies past every possible offset, where nothing can be written."""
    if length <= 0 or offset >= L.MAX_HOST_OFFSET:
        return range(0)
    bits = node.header.cluster_bits
    return range(offset >> bits, (offset + length - 1 >> bits) + 1)


def regions(node: Qcow2Node) -> Iterator[Region]:
    """Yield all metadata that the tables tell of, the most fundamental first."""
    header, bits = node.header, node.header.cluster_bits
    yield Region(HEADER, range(1))
    yield Region(ACTIVE_L1, span(node, header.l1_offset, header.l1_size * L.ENTRY_SIZE))
    table_bytes = header.refcount_table_clusters * node.cluster_size
    yield Region(REFCOUNT_TABLE, span(node, header.refcount_table_offset, table_bytes))
    yield Region(REFCOUNT_BLOCK, *_named(node.refcounts.table, L.REFCOUNT_TABLE_OFFSET_MASK, bits))
    if header.snapshot_count:
        yield Region(SNAPSHOT_TABLE, span(node, header.snapshots_offset, node.snapshot_table_bytes))
    if node.snapshots:
        yield from _snapshots(node)
    if header.crypt_method:
        from cowhand.block.formats.qcow2.cluster.encryption import header_region

        yield Region(ENCRYPTION_HEADER, span(node, *header_region(header)))
    directory = node.bitmap_directory
    if directory.readable:
        yield Region(BITMAP_DIRECTORY, span(node, directory.offset, directory.size))
    table = node.mapping.l1.data
    clusters, repeated = _named(table, L.L1_OFFSET_MASK, bits)
    times: Mapping[int, int] = {}
    if repeated is not None and len(table) <= _PLAIN_ENTRIES * 8:
        times, repeated = _shared(table, bits)
    yield Region(ACTIVE_L2, clusters, repeated, _alone(table, bits) if node.snapshots else range(0), times)


def _shared(table: bytearray, bits: int) -> tuple[dict[int, int], int | None]:
    """Return {L2 table: how many entries name it} of those that the active L1 *table* names several times, and one that its COPIED flag forbids.

    Programs that store equal things once make such images: each of the entries lets its table be copied before anything changes in it.
    """
    words = [word for (word,) in L.U64.iter_unpack(bytes(table[: len(table) // 8 * 8])) if word & L.L1_OFFSET_MASK]
    counts = Counter((word & L.L1_OFFSET_MASK) >> bits for word in words)
    times = {cluster: count for cluster, count in counts.items() if count > 1}
    wrong = (cluster for word in words if word & L.COPIED and (cluster := (word & L.L1_OFFSET_MASK) >> bits) in times)
    return times, next(wrong, None)


def _snapshots(node: Qcow2Node) -> Iterator[Region]:
    """Yield the L1 tables of snapshots and what these name."""
    from cowhand.block.formats.qcow2.snapshot.table import check_l1, read_l1

    total = 0
    # Many entries of a hostile table can name one L1 table.
    for snapshot in {(snapshot.l1_offset, snapshot.l1_size): snapshot for snapshot in node.snapshots}.values():
        try:
            check_l1(node, snapshot)
        except CowhandError:
            continue  # nobody can follow it
        total += max(_LEAST_L1_BYTES, snapshot.l1_size * L.ENTRY_SIZE)
        if total > MAX_INACTIVE_L1_BYTES:
            raise UnsupportedFeature(
                f"the L1 tables of the image's snapshots take more than {MAX_INACTIVE_L1_BYTES >> 20} MiB: too much to protect what they name",
                path=node.filename, hint="Open the image with overlap-check=cached to write without that protection.", errno=27,
            )  # fmt: skip
        yield Region(INACTIVE_L1, span(node, snapshot.l1_offset, snapshot.l1_size * L.ENTRY_SIZE))
        if _inactive_asked(node) is not False:
            yield Region(INACTIVE_L2, _named(read_l1(node, snapshot), L.L1_OFFSET_MASK, node.header.cluster_bits)[0])


def _inactive_asked(node: Qcow2Node) -> bool | None:
    """Say whether what snapshots refer to is to be protected; None where nobody asked, and it is done as far as possible."""
    options = node.options
    if options.overlap_inactive_l2 is not None:
        return options.overlap_inactive_l2
    template = options.overlap_template or options.overlap_check
    return None if template is None else template == "all"


def unknown(node: Qcow2Node) -> CowhandError | None:
    """Return why what snapshots refer to cannot be known, where its protection was asked for."""
    from cowhand.block.formats.qcow2.snapshot.table import check_l1

    if _inactive_asked(node):
        for snapshot in node.snapshots:
            try:
                check_l1(node, snapshot)
            except CowhandError as error:
                return error
    return None


def build(node: Qcow2Node) -> MetadataMap:
    """Return the map of *node*'s metadata. Raises UnsupportedFeature when there is too much of it."""
    out = MetadataMap()
    out.include(regions(node))
    return out


def conflict(node: Qcow2Node) -> tuple[str, int] | None:
    """Return (kind, host cluster) of metadata that other metadata lies over, so that to write the one would damage the other; or None.

    L2 tables may be shared between snapshots, and with or in the active L1 table by entries without the COPIED flag; nothing else may be.
    """
    seen: dict[str, Pool] = {}
    for region in regions(node):
        for name, clusters in seen.items():
            if region.name == name and name in _OF_SNAPSHOTS:
                continue  # they are only read
            if region.name in (REFCOUNT_TABLE, REFCOUNT_BLOCK) and not node.header.refcount_table_offset:
                # The header's bytes count nothing: every allocation finds cluster 0 free, and is refused with words of its own.
                continue
            shared_well = region.name == ACTIVE_L2 and name == INACTIVE_L2
            cluster = _common(region.alone if shared_well else region.clusters, clusters)
            if cluster is not None:
                return name, cluster
        if region.repeated is not None and node.header.refcount_table_offset:
            return region.name, region.repeated
        seen[region.name] = _united(seen.get(region.name, set()), [region.clusters])
    return None


def owner(node: Qcow2Node, first: int, last: int) -> str | None:
    """Return QEMU's name of the metadata that host clusters ``[first, last]`` touch, or None."""
    wanted = range(first, last + 1)
    for region in regions(node):
        if _common(wanted, region.clusters) is not None:
            return region.name
    return None

"""Sets of host clusters, and the map of those that hold metadata, in the form that suits how many they are.

Source: the kinds of metadata are those of QEMU's ``overlap-check`` option (``qapi/block-core.json``).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

#: Clusters above which a sorted array replaces the set, whose elements take ten times the space.
SET_LIMIT = 1 << 17
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
OF_SNAPSHOTS = (INACTIVE_L1, INACTIVE_L2)


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
            if region.name in OF_SNAPSHOTS:
                kept.append(region.clusters)
            # Together, since each union sorts all that is there; not too many, since they are kept twice meanwhile.
            if count > _WAITING_LIMIT:
                self._clusters, self._kept = united(self._clusters, waiting), united(self._kept, kept)
                waiting, kept, count = [], [], 0
        self._clusters, self._kept = united(self._clusters, waiting), united(self._kept, kept)

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
        return common(range(first, last + 1), self._clusters)


def united(one: Pool, others: list[Clusters]) -> Pool:
    """Return the union of all; *one* may be changed."""
    others = [other for other in others if other]
    if isinstance(one, set) and len(one) + sum(map(len, others)) <= SET_LIMIT:
        one.update(*others)
        return one
    if not one and len(others) == 1 and isinstance(others[0], ManyClusters):
        return others[0]
    if not others:
        return one
    import numpy

    # In the memory that is kept: what four million clusters need is not needed twice.
    both = array("Q", bytes(8 * (len(one) + sum(map(len, others)))))
    values, at = numpy.frombuffer(both, "u8"), 0
    for part in (one, *others):
        values[at : at + len(part)] = column(part)
        at += len(part)
    # Merging what is in order already; ranges, and most tables, are.
    values.sort(kind="stable")
    new = values[1:] != values[:-1]
    return ManyClusters(both if new.all() else ascending(values[numpy.append(True, new)]))


def ascending(column: Any) -> array[int]:
    out = array("Q")
    out.frombytes(memoryview(column).cast("B"))
    return out


def column(clusters: Clusters) -> Any:
    """Return *clusters* as a numpy array."""
    import numpy

    if isinstance(clusters, ManyClusters) and clusters.ordered is not None:
        return numpy.frombuffer(clusters.ordered, "u8")
    if isinstance(clusters, range):
        return numpy.arange(clusters.start, clusters.stop, clusters.step, dtype="u8")
    return numpy.fromiter(clusters, "u8", len(clusters))


def common(one: Clusters, other: Clusters) -> int | None:
    """Return a number that both contain, or None, by way of the smaller one."""
    if len(one) > len(other):
        one, other = other, one
    if isinstance(other, set) and other.isdisjoint(one):
        return None
    return next((cluster for cluster in one if cluster in other), None)

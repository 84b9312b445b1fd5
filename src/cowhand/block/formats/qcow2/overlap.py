"""What of a qcow2 file is metadata: so that nothing else is ever written there, whatever a damaged or hostile image claims.

QEMU's kinds and texts. QEMU looks at what it has cached; here everything that the tables tell of is known before the first write, also the tables
of snapshots (unless ``overlap-check`` names less), and an image whose own tables overlap one another is not written at all.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.cluster.encryption import header_region
from cowhand.block.formats.qcow2.metadata.cluster_sets import (
    ACTIVE_L1,
    ACTIVE_L2,
    BITMAP_DIRECTORY,
    ENCRYPTION_HEADER,
    HEADER,
    INACTIVE_L1,
    INACTIVE_L2,
    OF_SNAPSHOTS,
    REFCOUNT_BLOCK,
    REFCOUNT_TABLE,
    SET_LIMIT,
    SNAPSHOT_TABLE,
    Clusters,
    ManyClusters,
    MetadataMap,
    Pool,
    Region,
    ascending,
    common,
    united,
)
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.snapshot.table import check_l1, read_l1
from cowhand.core.errors import CowhandError, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node

#: Bytes of snapshots' L1 tables that are read to protect what they name: 4,096 snapshots of a disk of 1 TiB. A table counts as 8 KiB at least.
MAX_INACTIVE_L1_BYTES = 64 << 20
_LEAST_L1_BYTES = 8 << 10
#: Entries of a table above which numpy, which takes 100 ms to import, finds the distinct ones faster.
_PLAIN_ENTRIES = 1 << 16


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
    return set(words.tolist()) if len(words) <= SET_LIMIT else ManyClusters(ascending(words)), repeated


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
        # A hostile table can span 2 GiB of what is not there; behind the end of the file lies nothing of it.
        inside = min(node.snapshot_table_bytes, node.file.node.size - header.snapshots_offset)
        yield Region(SNAPSHOT_TABLE, span(node, header.snapshots_offset, inside))
    if node.snapshots:
        yield from _snapshots(node)
    if header.crypt_method:
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
            if region.name == name and name in OF_SNAPSHOTS:
                continue  # they are only read
            if region.name in (REFCOUNT_TABLE, REFCOUNT_BLOCK) and not node.header.refcount_table_offset:
                # The header's bytes count nothing: every allocation finds cluster 0 free, and is refused with words of its own.
                continue
            shared_well = region.name == ACTIVE_L2 and name == INACTIVE_L2
            cluster = common(region.alone if shared_well else region.clusters, clusters)
            if cluster is not None:
                return name, cluster
        if region.repeated is not None and node.header.refcount_table_offset:
            return region.name, region.repeated
        seen[region.name] = united(seen.get(region.name, set()), [region.clusters])
    return None


def owner(node: Qcow2Node, first: int, last: int) -> str | None:
    """Return QEMU's name of the metadata that host clusters ``[first, last]`` touch, or None."""
    wanted = range(first, last + 1)
    for region in regions(node):
        if common(wanted, region.clusters) is not None:
            return region.name
    return None

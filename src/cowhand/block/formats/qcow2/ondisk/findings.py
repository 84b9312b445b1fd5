"""Everything that a check of a qcow2 image can tell. The words are those of qemu-img's check, which people and scripts compare; no I/O."""

from __future__ import annotations

from cowhand.block.node.records import Kind

# -- counts of clusters
LEAKED = Kind("leaked-cluster", "{verb} cluster {cluster} refcount={refcount} reference={reference}")
COUNT_LOW = Kind("refcount-too-low", LEAKED.template)
COUNT_UNREADABLE = Kind("refcount-unreadable", "Can't get refcount for cluster {cluster}: Input/output error")
COUNT_OVERFLOW = Kind(
    "refcount-overflow",
    "ERROR: overflow cluster offset={host:#x}\nUse qemu-img amend to increase the refcount entry width or "
    "qemu-img convert to create a clean copy if the image cannot be opened for writing",
)
BEYOND_END = Kind(
    "beyond-end-of-file",
    "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
    "offset {host:#x} size {length:#x}",
)

# -- the refcount structure
BLOCK_RESERVED = Kind("refcount-table-reserved-bits", "ERROR refcount table entry {index} has reserved bits set")
BLOCK_UNALIGNED = Kind(
    "refcount-block-unaligned", "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
)
BLOCK_OUTSIDE = Kind("refcount-block-outside", "{verb} refcount block {index} is outside image")
BLOCK_SHARED = Kind("refcount-block-shared", "ERROR refcount block {index} refcount={refcount}")
REBUILD_NEEDED = Kind("rebuild-needed", "ERROR need to rebuild refcount structures")
REBUILDING = Kind("rebuilding", "Rebuilding refcount structure")
STILL_BROKEN = Kind("rebuild-failed", "ERROR rebuilt refcount structure is still broken")
LEAKS_KEPT = Kind("leaks-kept", "Leaked clusters are kept: they may be of {what} that cannot be found any more")

# -- snapshots
SNAPSHOT_TABLE = Kind("snapshot-table-unreadable", "ERROR {reason}", as_tool=True)
SNAPSHOT_ADVICE = Kind("snapshot-table-advice", "{advice}")
SNAPSHOT_INCOMPLETE = Kind("snapshot-entry-incomplete", "{verb} snapshot table entry {index} is incomplete")
SNAPSHOTS_TOO_MANY = Kind("snapshots-too-many", "Discarding {count} overhanging snapshots")
SNAPSHOTS_TOO_BIG = Kind(
    "snapshot-table-too-big", "Discarding {count} overhanging snapshots (snapshot table is too big)"
)
SNAPSHOT_EXTRA = Kind(
    "snapshot-extra-data", "Discarding too much extra metadata in snapshot table entry {index} ({size} > {limit})"
)
SNAPSHOTS_WITH_DATA_FILE = Kind("snapshots-with-data-file", "ERROR {count} snapshots in image with data file")
SNAPSHOT_L1_UNALIGNED = Kind(
    "snapshot-l1-unaligned",
    "ERROR snapshot {id} ({name}) l1_offset={host:#x}: L1 table is not cluster aligned; snapshot table entry corrupted",
)
SNAPSHOT_L1_TOO_LARGE = Kind(
    "snapshot-l1-too-large",
    "ERROR snapshot {id} ({name}) l1_size={size:#x}: L1 table is too large; snapshot table entry corrupted",
)

# -- L1 and L2 tables
L1_UNREADABLE = Kind("l1-table-unreadable", "ERROR: I/O error in check_refcounts_l1")
L1_RESERVED = Kind("l1-reserved-bits", "ERROR found L1 entry with reserved bits set: {entry:x}")
L2_TABLE_UNALIGNED = Kind(
    "l2-table-unaligned", "ERROR l2_offset={host:x}: Table is not cluster aligned; L1 entry corrupted"
)
L2_UNREADABLE = Kind("l2-table-unreadable", "ERROR: I/O error in check_refcounts_l2")
L2_UNREADABLE_AGAIN = Kind("l2-table-unreadable", "ERROR: Could not read L2 table: Input/output error")
L2_RESERVED = Kind("l2-reserved-bits", "ERROR found l2 entry with reserved bits set: {entry:x}")
DATA_UNALIGNED = Kind(
    "data-cluster-unaligned", "ERROR offset={host:x}: Data cluster is not properly aligned; L2 entry corrupted."
)
PREALLOCATED_UNALIGNED = Kind(
    "preallocated-cluster-unaligned",
    "{verb} offset={host:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.",
)
SUBCLUSTERS_WITHOUT_CLUSTER = Kind(
    "subclusters-without-cluster", "ERROR: Unallocated cluster has non-zero subcluster allocation map"
)
SUBCLUSTERS_CONTRADICT = Kind(
    "subclusters-contradict", "ERROR offset={host:x}: Allocated cluster has corrupted subcluster allocation bitmap"
)
COMPRESSED_COPIED = Kind(
    "compressed-copied-flag", "ERROR: coffset={host:#x}: copied flag must never be set for compressed clusters"
)
COMPRESSED_WITH_DATA_FILE = Kind(
    "compressed-with-data-file", "ERROR compressed cluster {index} with data file, entry={entry:#x}"
)
COMPRESSED_SUBCLUSTERS = Kind(
    "compressed-with-subclusters",
    "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}",
)
COPIED_L2 = Kind(
    "copied-flag-of-table",
    "{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}",
)
COPIED_DATA = Kind("copied-flag-of-data", "{verb} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")

# -- bitmaps
BITMAP_DIRECTORY = Kind("bitmap-directory", "{verb} bitmap directory: {problem} (offset {offset:#x})")
BITMAP_DIRECTORY_UNREADABLE = Kind("bitmap-directory-unreadable", "ERROR: I/O error in the bitmap directory")
BITMAP_TABLE_UNREADABLE = Kind("bitmap-table-unreadable", "ERROR: I/O error in a bitmap table")
BITMAPS_LEFT = Kind("bitmaps-left", "The bitmap directory has {count} bitmaps now")

# -- the check and the repair themselves
MORE = Kind("more", "More than {limit} findings: the others are counted, but not listed")
MARKED_CORRUPT = Kind(
    "marked-corrupt", "qcow2: Marking image as corrupt: {reason}; further corruption events will be suppressed"
)
FOUND_CORRUPT = Kind(
    "found-corrupt", "qcow2: Image is corrupt: {reason}; further non-fatal corruption events will be suppressed"
)
REPAIR_FAILED = Kind("repair-failed", "{reason}")

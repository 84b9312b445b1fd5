"""How large a new qcow2 image becomes (QEMU ``docs/interop/qcow2``; the figures are those of ``qemu-img measure`` 7.2).

The "fully allocated" size is exact for an image whose every cluster is written; the "required" one counts the metadata of a full image, and
so is a little more than a sparse image needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cowhand.block.formats.qcow2.ondisk import layout
from cowhand.core.errors import InvalidArgument

_DEFAULT_CLUSTER = 65536
_EXTENDED_MIN_CLUSTER = 16384
_EXTENDED_ENTRY_SIZE = 16
_PREALLOCATIONS = ("off", "metadata", "falloc", "full")


def measure(
    options: Mapping[str, Any], size: int | None, source_size: int | None, data_in_units: Callable[[int], int] | None
) -> tuple[int, int, int]:
    """Return (required, fully allocated, cluster size) in bytes for an image made with *options*.

    *size* is the new image's, or *source_size* that of an existing one whose data *data_in_units* counts in whole clusters of a given size.
    Raises InvalidArgument as creating would.
    """
    cluster, entry, order = geometry(options)
    preallocation = options.get("preallocation", "off")
    if preallocation not in _PREALLOCATIONS:
        raise InvalidArgument(f"invalid parameter value: {preallocation}", hint="One of: " + ", ".join(_PREALLOCATIONS))
    virtual = _round_up(size or 0, cluster)
    if -(-virtual // cluster // (cluster // entry)) * layout.ENTRY_SIZE > layout.MAX_L1_BYTES:
        raise InvalidArgument("The image size is too large (try using a larger cluster size)")
    data = 0
    if source_size is not None and data_in_units is not None:
        virtual = _round_up(source_size, cluster)
        # How much of it the new image's backing file has in common is not known: perhaps nothing.
        data = virtual if options.get("backing_file") is not None else data_in_units(cluster)
    if preallocation in ("falloc", "full"):
        data = virtual
    full = fully_allocated(virtual, cluster, order, entry) + _encryption_header(options, cluster)
    return full - virtual + data, full, cluster


def _encryption_header(options: Mapping[str, Any], cluster: int) -> int:
    if options.get("encrypt.format") != "luks":
        return 0
    from cowhand.block.formats.qcow2.amend.key_slots import header_length

    return _round_up(header_length(options), cluster)


def geometry(options: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (cluster size, bytes of an L2 entry, refcount order) that *options* ask for; raises InvalidArgument."""
    extended = bool(options.get("extended_l2", False))
    cluster = options.get("cluster_size", _DEFAULT_CLUSTER)
    if cluster & (cluster - 1) or not layout.CLUSTER_BITS_MIN <= cluster.bit_length() - 1 <= layout.CLUSTER_BITS_MAX:
        raise InvalidArgument("Cluster size must be a power of two between 512 and 2048k")
    if extended and cluster < _EXTENDED_MIN_CLUSTER:
        raise InvalidArgument(
            f"Extended L2 entries are only supported with cluster sizes of at least {_EXTENDED_MIN_CLUSTER} bytes"
        )
    compat = options.get("compat", "1.1")
    if compat not in ("0.10", "1.1", "v2", "v3"):
        raise InvalidArgument(f"Invalid compatibility level: '{compat}'", hint="Either 1.1 or 0.10.")
    bits = options.get("refcount_bits", 16)
    if bits < 1 or bits > 64 or bits & (bits - 1):
        raise InvalidArgument("Refcount width must be a power of two and may not exceed 64 bits")
    if compat in ("0.10", "v2") and bits != 16:
        raise InvalidArgument(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        )
    return cluster, _EXTENDED_ENTRY_SIZE if extended else layout.ENTRY_SIZE, bits.bit_length() - 1


def fully_allocated(size: int, cluster: int, refcount_order: int, entry: int = layout.ENTRY_SIZE) -> int:
    """Return the bytes of an image of *size* bytes, all of it written: header, tables, reference counts and data."""
    clusters = -(-size // cluster)
    l2_entries = _round_up(clusters, cluster // entry)
    l1_entries = _round_up(l2_entries * entry // cluster, cluster // layout.ENTRY_SIZE)
    metadata = cluster + l2_entries * entry + l1_entries * layout.ENTRY_SIZE
    counted = metadata // cluster + clusters
    return metadata + refcount_bytes(counted, cluster, refcount_order) + clusters * cluster


def refcount_bytes(clusters: int, cluster: int, refcount_order: int) -> int:
    """Return the bytes of the blocks and the table that count *clusters* clusters, and themselves."""
    per_block = cluster * 8 >> refcount_order
    per_table = cluster // layout.ENTRY_SIZE
    total = 0
    while True:
        # The counts of the count blocks make more count blocks: go on until nothing changes.
        blocks = -(-max(total, clusters) // per_block)
        tables = -(-blocks // per_table)
        if clusters + blocks + tables == total:
            return (blocks + tables) * cluster
        total = clusters + blocks + tables


def bitmaps_size(bitmaps: list[tuple[str, int]], size: int, cluster: int) -> int:
    """Return the bytes that copies of persistent *bitmaps*, (name, granularity), of a disk of *size* bytes take at most."""
    total = directory = 0
    for name, granularity in bitmaps:
        nbytes = _round_up(-(-size // granularity), 8) // 8
        clusters = _round_up(nbytes, cluster) // cluster
        total += clusters * cluster + _round_up(clusters * layout.ENTRY_SIZE, cluster)
        directory += _round_up(layout.BITMAP_DIRECTORY_ENTRY.size + len(name.encode("utf-8", "surrogateescape")), 8)
    return total + _round_up(directory, cluster)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

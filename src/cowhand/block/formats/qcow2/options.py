"""The options of an open qcow2 image (QEMU ``qapi/block-core.json``, BlockdevOptionsQcow2; ``docs/qcow2-cache.txt``)."""

from __future__ import annotations

from typing import Any

from cowhand.block.options import NodeOptions, option
from cowhand.core.errors import InvalidArgument

#: QEMU: a cache entry is a power of two from here to the cluster size.
MIN_ENTRY_SIZE = 512


def _overlap(what: str, help: str = "accepted; always on") -> Any:
    return option(kind="bool", name=f"overlap-check.{what}", help=help, strong=False)


class Qcow2Options(NodeOptions):
    """Options of an open qcow2 image (QEMU ``qapi/block-core.json``, BlockdevOptionsQcow2)."""

    lazy_refcounts: bool | None = option(
        kind="bool", help="postpone writing reference counts until the image is closed", strong=False
    )
    pass_discard_request: bool | None = option(kind="bool", help="hand the guest's discards down", strong=False)
    pass_discard_snapshot: bool = option(
        True, kind="bool", help="hand down what deleting a snapshot frees", strong=False
    )
    pass_discard_other: bool = option(False, kind="bool", help="hand down what else is freed", strong=False)
    overlap_check: str | None = option(
        help="what writes are checked against", choices=("none", "constant", "cached", "all"), strong=False
    )
    overlap_template: str | None = option(
        name="overlap-check.template", help="the same", choices=("none", "constant", "cached", "all"), strong=False
    )
    overlap_main_header: bool | None = _overlap("main-header")
    overlap_active_l1: bool | None = _overlap("active-l1")
    overlap_active_l2: bool | None = _overlap("active-l2")
    overlap_refcount_table: bool | None = _overlap("refcount-table")
    overlap_refcount_block: bool | None = _overlap("refcount-block")
    overlap_snapshot_table: bool | None = _overlap("snapshot-table")
    overlap_inactive_l1: bool | None = _overlap("inactive-l1")
    overlap_inactive_l2: bool | None = _overlap("inactive-l2", "with snapshots, or fail")
    overlap_bitmap_directory: bool | None = _overlap("bitmap-directory")
    cache_size: int | None = option(kind="size", help="bytes for L2 tables and refcount blocks", strong=False)
    l2_cache_size: int | None = option(kind="size", help="bytes for L2 tables", strong=False)
    l2_cache_entry_size: int | None = option(kind="size", help="accepted; whole tables are cached", strong=False)
    refcount_cache_size: int | None = option(kind="size", help="bytes for refcount blocks", strong=False)
    cache_clean_interval: int | None = option(
        kind="int", help="accepted; clean tables are dropped when room is needed", strong=False
    )


def check_cache_options(options: Qcow2Options, cluster_size: int) -> None:
    """Raise InvalidArgument where the cache sizes contradict one another, or an entry's size is none that *cluster_size* allows."""
    whole, tables, counts = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    if whole is not None:
        if tables is not None and counts is not None:
            raise InvalidArgument("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
        for name, part in (("l2-cache-size", tables), ("refcount-cache-size", counts)):
            if part is not None and part > whole:
                raise InvalidArgument(f"{name} may not exceed cache-size")
    entry = options.l2_cache_entry_size
    if entry is not None and (entry & (entry - 1) or not MIN_ENTRY_SIZE <= entry <= cluster_size):
        raise InvalidArgument(
            f"L2 cache entry size must be a power of two between {MIN_ENTRY_SIZE} and the cluster size ({cluster_size})"
        )

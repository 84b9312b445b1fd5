"""The options of an open qcow2 image (QEMU ``qapi/block-core.json``, BlockdevOptionsQcow2; ``docs/qcow2-cache.txt``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.format_io.reservations import Kind
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.ondisk.header import Header

#: QEMU: a cache entry is a power of two from here to the cluster size.
MIN_ENTRY_SIZE = 512


def _overlap_switch(what: str, help: str = "accepted; always on") -> Any:
    return option(kind="bool", name=f"overlap-check.{what}", help=help, strong=False)


class Qcow2Options(NodeOptions):
    """Options of an open qcow2 image (QEMU ``qapi/block-core.json``, BlockdevOptionsQcow2)."""

    lazy_refcounts: bool | None = option(
        kind="bool", help="postpone writing reference counts until the image is closed", strong=False
    )
    pass_discard_request: bool | None = option(kind="bool", help="hand the guest's discards down", strong=False)
    pass_discard_snapshot: bool = option(
        True, kind="bool", help="hand down what a deleted snapshot, a commit or a shrink frees", strong=False
    )
    pass_discard_other: bool = option(False, kind="bool", help="hand down what else is freed", strong=False)
    overlap_check: str | None = option(
        help="what writes are checked against: none, constant, cached or all", strong=False
    )
    overlap_template: str | None = option(name="overlap-check.template", help="the same", strong=False)
    overlap_main_header: bool | None = _overlap_switch("main-header")
    overlap_active_l1: bool | None = _overlap_switch("active-l1")
    overlap_active_l2: bool | None = _overlap_switch("active-l2")
    overlap_refcount_table: bool | None = _overlap_switch("refcount-table")
    overlap_refcount_block: bool | None = _overlap_switch("refcount-block")
    overlap_snapshot_table: bool | None = _overlap_switch("snapshot-table")
    overlap_inactive_l1: bool | None = _overlap_switch("inactive-l1")
    overlap_inactive_l2: bool | None = _overlap_switch("inactive-l2", "with snapshots, or fail")
    overlap_bitmap_directory: bool | None = _overlap_switch("bitmap-directory")
    cache_size: int | None = option(kind="size", help="bytes for L2 tables and refcount blocks", strong=False)
    l2_cache_size: int | None = option(kind="size", help="bytes for L2 tables", strong=False)
    l2_cache_entry_size: int | None = option(kind="size", help="accepted; whole tables are cached", strong=False)
    refcount_cache_size: int | None = option(kind="size", help="bytes for refcount blocks", strong=False)
    cache_clean_interval: int | None = option(
        kind="int", help="accepted; clean tables are dropped when room is needed", strong=False
    )

    @classmethod
    def join(cls, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        """Return what holds after a reopen; a new template or total size replaces what was set in detail, and a detail the old total."""
        kept = dict(old)
        if any(name in new for name in _OVERLAP):
            kept = {name: value for name, value in kept.items() if name.partition(".")[0] != "overlap-check"}
        if "cache-size" in new:
            for name in ("l2-cache-size", "refcount-cache-size"):
                kept.pop(name, None)
        elif "l2-cache-size" in new or "refcount-cache-size" in new:
            kept.pop("cache-size", None)
        return {**kept, **new}


_OVERLAP_TEMPLATES = ("none", "constant", "cached", "all")
_OVERLAP = ("overlap-check", "overlap-check.template")
#: QEMU counts a cache's entries, and the seconds of an interval, in words of 32 bits.
_MAX_ENTRIES = (1 << 31) - 1
_MAX_INTERVAL = (1 << 32) - 1


def hands_down(options: Qcow2Options, kind: Kind) -> bool:
    """Tell whether the file below hears of what a reservation of *kind* frees: discards if asked for, what a shrink or a commit frees by default."""
    if kind == Kind.EMPTY:
        return options.pass_discard_snapshot
    return options.pass_discard_request if options.pass_discard_request is not None else options.discard == "unmap"


def check_options(options: Qcow2Options, header: Header, entry_size: int) -> None:
    """Raise InvalidArgument where options contradict one another or the image, whose L2 entries take *entry_size* bytes."""
    _check_caches(options, header.cluster_size, -(-header.size // header.cluster_size) * entry_size)
    if options.lazy_refcounts and header.version < 3:
        raise InvalidArgument("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    interval = options.cache_clean_interval
    if interval is not None and not 0 <= interval <= _MAX_INTERVAL:
        raise InvalidArgument("Cache clean interval too big")
    whole, template = options.overlap_check, options.overlap_template
    if whole is not None and template is not None and whole != template:
        raise InvalidArgument(
            f"Conflicting values for qcow2 options 'overlap-check' ('{whole}') and 'overlap-check.template' ('{template}')"
        )
    for value in (whole, template):
        if value is not None and value not in _OVERLAP_TEMPLATES:
            raise InvalidArgument(
                f"Unsupported value '{value}' for qcow2 option 'overlap-check'. "
                f"Allowed are any of the following: {', '.join(_OVERLAP_TEMPLATES)}"
            )


def _check_caches(options: Qcow2Options, cluster_size: int, all_tables: int) -> None:
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
    if min(tables or 0, all_tables) // (entry or cluster_size) > _MAX_ENTRIES:
        raise InvalidArgument("L2 cache size too big")
    if (counts or 0) // cluster_size > _MAX_ENTRIES:
        raise InvalidArgument("Refcount cache size too big")

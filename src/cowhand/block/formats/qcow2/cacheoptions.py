"""The options that size the caches of metadata: which of them go together.

Source: QEMU ``docs/qcow2-cache.txt``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Options

#: QEMU: a cache entry is a power of two from here to the cluster size.
MIN_ENTRY_SIZE = 512


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

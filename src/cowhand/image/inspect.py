"""The inside of an image, for people who want to understand or rescue it: its header, and where its tables lie."""

from __future__ import annotations

from typing import Any

from cowhand.block.disk import Disk
from cowhand.block.opening.opening import Opening
from cowhand.core.errors import NotSupported

#: Rows that are told of.
MAX_REGIONS = 4096
_NUMBERS = (
    "version", "cluster_bits", "size", "crypt_method", "l1_size", "l1_offset", "refcount_table_offset", "refcount_table_clusters",
    "refcount_order", "snapshot_count", "snapshots_offset", "header_length", "compression_type",
)  # fmt: skip


def inspect(path: str, format: str | None = None) -> dict[str, Any]:
    """Return {"header": fields, "regions": rows (offset, length, what), "regions-left-out": number} of the qcow2 image at *path*.

    Nothing under it is opened. Raises what opening raises, and NotSupported for other formats.
    """
    from cowhand.drivers import REGISTRY

    opening = Opening(REGISTRY, backing=False)
    opening.for_repair = True
    root: Any = opening.open(path, format=format, options={"read-only": True, "force-share": True})
    try:
        disk = Disk(root)
    except BaseException:
        opening.abandon()
        raise
    with disk:
        if root.driver != "qcow2":
            raise NotSupported(f"the structure of format '{root.driver}' is not known", path=path)
        rows, left = _regions(root)
        return {
            "filename": path,
            "format": root.driver,
            "header": _header(root),
            "regions": rows,
            "regions-left-out": left,
        }


def _header(node: Any) -> dict[str, Any]:
    from cowhand.block.formats.qcow2.ondisk import layout as L

    header = node.header
    out: dict[str, Any] = {name.replace("_", "-"): getattr(header, name) for name in _NUMBERS}
    fields = (header.incompatible, header.compatible, header.autoclear)
    names = [name for kind, bit, name in L.FEATURE_NAMES if fields[kind] & 1 << bit]
    known = [sum(1 << bit for kind, bit, _ in L.FEATURE_NAMES if kind == number) for number in range(3)]
    words = ("incompatible", "compatible", "autoclear")
    names += [
        f"unknown {word} {field & ~mask:#x}"
        for word, field, mask in zip(words, fields, known, strict=True)
        if field & ~mask
    ]
    out["features"] = names
    out["extensions"] = [f"{extension.kind:#010x} ({len(extension.data)} bytes)" for extension in header.extensions]
    out["backing-file"] = header.backing_name
    out["backing-format"] = header.backing_format
    return out


def _regions(node: Any) -> tuple[list[dict[str, Any]], int]:
    """Return the runs of clusters that hold metadata, in the order of the file, and how many more there are."""
    from cowhand.block.formats.qcow2 import overlap
    from cowhand.block.formats.qcow2.snapshot.table import read_snapshots

    node.snapshots, node.snapshot_table_bytes = read_snapshots(node, for_repair=False)
    found: list[tuple[int, int, str]] = []
    for region in overlap.regions(node):
        first = last = -2
        for cluster in region.clusters if isinstance(region.clusters, range) else sorted(region.clusters):
            if cluster != last + 1:
                if first >= 0:
                    found.append((first, last + 1, region.name))
                first = cluster
            last = cluster
        if first >= 0:
            found.append((first, last + 1, region.name))
    size = node.cluster_size
    rows = [{"offset": b * size, "length": (e - b) * size, "what": name} for b, e, name in sorted(found)[:MAX_REGIONS]]
    return rows, max(0, len(found) - MAX_REGIONS)

"""What ``info`` tells of a node, as QEMU's ImageInfo and as text. Source: QEMU ``qapi/block-core.json`` for the names."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cowhand.cli.compat import program
from cowhand.cli.compat.jsontext import ordered
from cowhand.cli.compat.sizes import human

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

#: The value of a snapshot's instruction count where none was recorded.
_NO_ICOUNT = (1 << 64) - 1
_DIRTY = 1
#: Drivers of files, of which there is something to tell on some file systems.
_FILES = ("file", "host_device")
#: QEMU knows of whole ones alone.
SECTOR = 512


def whole_sectors(size: int) -> int:
    """Return *size* as QEMU tells it, which knows of whole sectors alone."""
    return -(-size // SECTOR) * SECTOR


def image_info(node: BlockNode, *, limits: bool = False) -> dict[str, Any]:
    """Return the ImageInfo document of *node* alone; since 8.2 with its children, and with the *limits* of requests where they are asked for."""
    out: dict[str, Any] = {"filename": node.filename, "format": node.driver, "virtual-size": whole_sectors(node.size)}
    allocated = node.allocated_size()
    if allocated is not None:
        out["actual-size"] = allocated
    source = _informed(node)
    if source is not None:
        if getattr(source, "cluster_size", 0):
            out["cluster-size"] = source.cluster_size
        out["dirty-flag"] = bool(getattr(getattr(source, "header", None), "incompatible", 0) & _DIRTY)
    header: Any = getattr(node, "header", None)
    method: int = getattr(header, "crypt_method", 0)
    if method or node.driver == "luks":
        out["encrypted"] = True
    out |= _backing(node)
    snapshots = [snapshot_info(item) for item in getattr(node, "snapshots", ())]
    if snapshots:
        out["snapshots"] = snapshots
    specific = node.format_specific()
    if specific:
        out["format-specific"] = {"type": node.driver, "data": dict(specific)}
    if limits:
        out["limits"] = _limits(node)
    if program.since("8.2"):
        out["children"] = [
            {"name": name, "info": _child_info(child.node, limits)}
            for name, child in node.children.items()
            if name != "backing"
        ]
    return out


def _child_info(node: BlockNode, limits: bool) -> dict[str, Any]:
    out = image_info(node, limits=limits)
    if node.driver in _FILES:
        out["format-specific"] = {"type": "file", "data": {}}
    return out


def _limits(node: BlockNode) -> dict[str, Any]:
    """Return the BlockLimitsInfo document of *node*; what has no limit is left out."""
    known = node.limits
    out = {
        "request-alignment": known.request_alignment,
        "discard-alignment": known.discard_alignment,
        "write-zeroes-alignment": known.zero_alignment,
        "opt-transfer": known.preferred_io,
    }
    return {name: value for name, value in out.items() if name == "request-alignment" or value > 1}


def _informed(node: BlockNode) -> Any:
    """Return the node that knows a cluster size and a dirty bit for *node*, or None."""
    while node.driver not in ("qcow2", "file", "host_device"):
        primary = node.primary
        if primary is None:
            return None
        node = primary.node
    return node


def _backing(node: BlockNode) -> dict[str, Any]:
    header: Any = getattr(node, "header", None)
    name = getattr(header, "backing_name", None)
    if not name:
        return {}
    from cowhand.block.opening.filenames import combine, location
    from cowhand.core.errors import CowhandError

    out = {"backing-filename": name}
    try:
        out["full-backing-filename"] = combine(location(node), name)
    except CowhandError:
        pass  # a relative name in an image that has no folder
    if header.backing_format:
        out["backing-filename-format"] = header.backing_format
    return out


def snapshot_info(record: Any) -> dict[str, Any]:
    """Return the SnapshotInfo document of a snapshot *record* of a format driver."""
    out = {
        "id": record.id,
        "name": record.name,
        "vm-state-size": record.vm_state_size,
        "date-sec": record.date_sec,
        "date-nsec": record.date_nsec,
        "vm-clock-sec": record.vm_clock_nsec // 1_000_000_000,
        "vm-clock-nsec": record.vm_clock_nsec % 1_000_000_000,
    }
    if record.icount not in (None, _NO_ICOUNT):
        out["icount"] = record.icount
    return out


def snapshot_table(snapshots: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a list of SnapshotInfo documents."""
    yield f"{'ID':<9} {'TAG':<16}{'VM SIZE':>9}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        seconds = one["vm-clock-sec"]
        milliseconds = one["vm-clock-nsec"] // 1_000_000
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
        size = human(one["vm-state-size"])
        ident, name = _padded(one["id"], 9), _padded(one["name"], 16)
        yield f"{ident} {name}{size:>9}{date:>20}{clock:>13}{one.get('icount', ''):>11}"


def _padded(text: str, width: int) -> str:
    """Return *text* with blanks behind it up to *width* bytes, which is what C's printf counts."""
    return text + " " * (width - len(os.fsencode(text)))


def as_text(info: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that describe an ImageInfo document."""
    size = info["virtual-size"]
    yield f"image: {info['filename']}"
    yield f"file format: {info['format']}"
    yield f"virtual size: {human(size)} ({size} bytes)"
    yield f"disk size: {human(info['actual-size']) if 'actual-size' in info else 'unavailable'}"
    if info.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in info:
        yield f"cluster_size: {info['cluster-size']}"
    if info.get("dirty-flag"):
        yield "cleanly shut down: no"
    if "backing-filename" in info:
        yield "backing file: " + _backing_words(info)
        if "backing-filename-format" in info:
            yield f"backing file format: {info['backing-filename-format']}"
    if "limits" in info:
        yield "Block limits:"
        yield from tree(info["limits"], 1)
    if "snapshots" in info:
        yield "Snapshot list:"
        yield from snapshot_table(info["snapshots"])
    if "format-specific" in info:
        yield "Format specific information:"
        yield from tree(info["format-specific"]["data"], 1)
    yield from _children(info, "")


def _children(info: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the blocks that tell of the nodes below, each with its way from the top."""
    for child in info.get("children", ()):
        below, place = child["info"], f"{path}/{child['name']}"
        size, bare = below["virtual-size"], not below["children"]
        yield f"Child node '{place}':"
        yield f"    filename: {below['filename']}"
        yield f"    {'protocol type' if bare else 'file format'}: {below['format']}"
        yield f"    {'file length' if bare else 'virtual size'}: {human(size)} ({size} bytes)"
        yield f"    disk size: {human(below['actual-size']) if 'actual-size' in below else 'unavailable'}"
        if "cluster-size" in below:
            yield f"    cluster_size: {below['cluster-size']}"
        if "limits" in below:
            yield "    Block limits:"
            yield from tree(below["limits"], 2)
        specific = below.get("format-specific", {}).get("data")
        if specific:
            yield "    Format specific information:"
            yield from tree(specific, 2)
        yield from _children(below, place)


def _backing_words(info: Mapping[str, Any]) -> str:
    name: str = info["backing-filename"]
    full = info.get("full-backing-filename")
    if full is None:
        return f"{name} (cannot determine actual path)"
    return name if full == name else f"{name} (actual path: {full})"


def tree(value: Mapping[str, Any] | Sequence[Any], depth: int) -> Iterator[str]:
    """Yield the lines of nested driver information: dashes of names become blanks, members in the hash table's order."""
    if isinstance(value, Mapping):
        items = [(key.replace("-", " "), item) for key, item in ordered(value).items()]
    else:
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    for name, item in items:
        if isinstance(item, (Mapping, list, tuple)):
            yield f"{'    ' * depth}{name}:"
            yield from tree(item, depth + 1)
        else:
            yield f"{'    ' * depth}{name}: {_scalar(item)}"


def _scalar(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)

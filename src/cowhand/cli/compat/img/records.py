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
_PAGE = 4096
#: How many buffers one request may have (IOV_MAX).
_MAX_IOV = 1024
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
        if source.cluster_size:
            out["cluster-size"] = source.cluster_size
        out["dirty-flag"] = bool(getattr(getattr(source, "header", None), "incompatible", 0) & _DIRTY)
    if _crypt_method(node) or node.driver == "luks":
        out["encrypted"] = True
    out |= _backing(node)
    snapshots = [snapshot_info(item) for item in getattr(node, "snapshots", ())]
    if snapshots:
        out["snapshots"] = snapshots
    specific = node.format_specific()
    if specific:
        out["format-specific"] = {"type": node.driver, "data": _as_told(specific)}
    elif node.driver in _FILES and program.since("8.2"):
        out["format-specific"] = {"type": "file", "data": {}}
    if limits:
        out["limits"] = _limits(node)
    if program.since("8.2"):
        out["children"] = [
            {"name": name, "info": image_info(child.node, limits=limits)}
            for name, child in reversed(node.children.items())  # QEMU puts each in front of the others
            if name != "backing"
        ]
    return out


def _as_told(specific: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a driver tells without what the version that is asked for does not know."""
    told = dict(specific)
    if not program.since("9.2"):
        told.pop("detached-header", None)
        if "encrypt" in told:
            told["encrypt"] = {key: value for key, value in told["encrypt"].items() if key != "detached-header"}
    return told


def _crypt_method(node: BlockNode) -> int:
    method: int = getattr(getattr(node, "header", None), "crypt_method", 0)
    return method


def _limits(node: BlockNode) -> dict[str, Any]:
    """Return the BlockLimitsInfo document of *node*; what has no limit is left out."""
    known = node.limits
    below = node
    while below.driver not in _FILES and below.primary is not None:
        below = below.primary.node
    # A format answers for single bytes, but for one that was guessed to be raw and one that is encrypted.
    whole = below is node or node.driver == "luks" or _crypt_method(node) or (node.driver == "raw" and node.probed)
    out = {
        "request-alignment": known.request_alignment if whole else 1,
        "discard-alignment": known.discard_alignment,
        "write-zeroes-alignment": known.zero_alignment,
    }
    out = {name: value for name, value in out.items() if name == "request-alignment" or value > 1}
    return out | {
        "min-mem-alignment": below.limits.request_alignment,
        "opt-mem-alignment": max(_PAGE, below.limits.request_alignment),
        "max-iov": _MAX_IOV,
    }


def _informed(node: BlockNode) -> Any:
    """Return the node that knows a cluster size and a dirty bit for *node*, or None."""
    while node.cluster_size is None and node.driver not in _FILES:
        primary = node.primary if node.is_filter or node.driver in ("raw", "luks") else None
        if primary is None:
            return None
        node = primary.node
    return node


def _backing(node: BlockNode) -> dict[str, Any]:
    if node.backing_link is None:
        return {}
    name, format = node.backing_link
    from cowhand.block.opening.filenames import combine, location
    from cowhand.core.errors import CowhandError

    out = {"backing-filename": name}
    try:
        out["full-backing-filename"] = combine(location(node), name)
    except CowhandError:
        pass  # a relative name in an image that has no folder
    if format:
        out["backing-filename-format"] = format
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
    later = program.since("9.2")
    if later:
        yield f"{'ID':<7} {'TAG':<16} {'VM_SIZE':>8} {'DATE':>19} {'VM_CLOCK':>15} {'ICOUNT':>10}"
    else:
        yield f"{'ID':<9} {'TAG':<16}{'VM SIZE':>9}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        seconds = one["vm-clock-sec"]
        milliseconds = one["vm-clock-nsec"] // 1_000_000
        clock = f"{seconds // 3600:0{4 if later else 2}}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
        size = human(one["vm-state-size"])
        ident, name = _padded(one["id"], 7 if later else 9), _padded(one["name"], 16)
        if later:
            yield f"{ident} {name} {size:>8} {date:>19} {clock:>15} {one.get('icount', '--'):>10}"
        else:
            yield f"{ident} {name}{size:>9}{date:>20}{clock:>13}{one.get('icount', ''):>11}"


def _padded(text: str, width: int) -> str:
    """Return *text* with blanks behind it up to *width* bytes, which is what C's printf counts."""
    return text + " " * (width - len(os.fsencode(text)))


def as_text(info: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that describe an ImageInfo document, and since 8.2 what lies below the image."""
    yield from _node_text(info, "", protocol=False)
    yield from _children(info, "", 1)


def _node_text(info: Mapping[str, Any], indent: str, *, protocol: bool) -> Iterator[str]:
    """Yield the lines of one node; *protocol*: of one that only stores another's bytes."""
    size = info["virtual-size"]
    yield f"{indent}{'filename' if protocol else 'image'}: {info['filename']}"
    yield f"{indent}{'protocol type' if protocol else 'file format'}: {info['format']}"
    yield f"{indent}{'file length' if protocol else 'virtual size'}: {human(size)} ({size} bytes)"
    yield f"{indent}disk size: {human(info['actual-size']) if 'actual-size' in info else 'unavailable'}"
    if info.get("encrypted"):
        yield f"{indent}encrypted: yes"
    if "cluster-size" in info:
        yield f"{indent}cluster_size: {info['cluster-size']}"
    if info.get("dirty-flag"):
        yield f"{indent}cleanly shut down: no"
    if "backing-filename" in info:
        yield f"{indent}backing file: {_backing_words(info)}"
        if "backing-filename-format" in info:
            yield f"{indent}backing file format: {info['backing-filename-format']}"
    depth = len(indent) // 4 + 1
    if "limits" in info:
        yield f"{indent}Block limits:"
        yield from tree(info["limits"], depth)
    if "snapshots" in info:
        yield f"{indent}Snapshot list:"
        for line in snapshot_table(info["snapshots"]):
            yield indent + line
    specific = info.get("format-specific", {}).get("data")
    if specific:
        yield f"{indent}Format specific information:"
        yield from tree(specific, depth)


def _children(info: Mapping[str, Any], path: str, depth: int) -> Iterator[str]:
    """Yield the blocks that tell of the nodes below, each with its way from the top, and indented as deep as it lies."""
    for child in info.get("children", ()):
        below, place = child["info"], f"{path}/{child['name']}"
        yield f"{'    ' * (depth - 1)}Child node '{place}':"
        yield from _node_text(below, "    " * depth, protocol=not below["children"])
        yield from _children(below, place, depth + 1)


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

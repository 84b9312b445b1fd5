"""How large a new image becomes: from a size, or from what an existing image holds. The figures are qemu-img measure's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.copy.engine import plan
from cowhand.copy.engine.plan import Policy
from cowhand.copy.engine.source import Source
from cowhand.core.errors import InvalidArgument, NotSupported
from cowhand.core.units import parse_size

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.records import SnapshotInfo
    from cowhand.block.opening.policy import Policy as OpenPolicy
    from cowhand.block.opening.registry import Registry


class Measurement(NamedTuple):
    """Bytes: what a new image with the source's data takes at most, what it takes when all is written, and what copies of bitmaps would add.

    ``bitmaps`` is None where source or target have none by their nature, and where they cannot be read: ``bitmaps_problem`` says why then.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None
    bitmaps_problem: str = ""


def measure(
    source: str | os.PathLike[str] | Mapping[str, Any] | Disk | None = None,
    target_format: str = "raw",
    *,
    size: int | str | None = None,
    options: Mapping[str, Any] | None = None,
    source_format: str | None = None,
    snapshot: str | SnapshotInfo | None = None,
    force_share: bool = False,
    policy: OpenPolicy | None = None,
    registry: Registry | None = None,
) -> Measurement:
    """Tell how large an image of *target_format* made with *options* becomes, for *size* or for the content of *source* (at *snapshot*).

    Writes nothing. Raises InvalidArgument for options that creating would refuse, NotSupported where a format cannot be measured.
    """
    from cowhand.block.node.create_options import FILE_OPTIONS, merge, parse
    from cowhand.image.create import create_options_of, format_of

    if (source is None) == (size is None):
        raise InvalidArgument("Either --size N or one filename must be specified.")
    if registry is None:
        from cowhand.drivers import REGISTRY

        registry = REGISTRY
    entry = format_of(target_format, registry)
    try:
        chosen = parse(merge(create_options_of(entry), FILE_OPTIONS), options or {})
    except InvalidArgument as error:
        error.qemu_message += f"\nInvalid options for file format '{target_format}'"
        raise
    cls: Any = entry.load()
    if not hasattr(cls, "measure"):
        raise NotSupported(f"Block driver '{target_format}' does not support size measurement")
    with ExitStack() as stack:
        if source is None:
            total = chosen.get("size", 0) if size is None else parse_size(size)
            required, full, _ = cls.measure(chosen, total, None, None)
            return Measurement(required, full)
        from cowhand.image.bitmaps import broken_reason
        from cowhand.image.open import open_source

        disk = open_source(source, stack, source_format, snapshot=snapshot, force_share=force_share, policy=policy)

        def data_in_units(unit: int) -> int:
            data = plan.totals(Source([disk]).runs(Policy(unit=unit))).data
            return -(-data // unit) * unit

        required, full, cluster = cls.measure(chosen, chosen.get("size"), disk.size, data_in_units)
        bitmaps = None
        if str(chosen.get("compat", "1.1")) not in ("0.10", "v2"):
            bitmaps = _bitmaps_of(disk, target_format, cluster)
        if bitmaps is not None and (broken := broken_reason(disk)) is not None:
            return Measurement(required, full, None, broken.message)
        return Measurement(required, full, bitmaps)


def _bitmaps_of(disk: Disk, target_format: str, cluster: int) -> int | None:
    """Return what copies of the source's persistent bitmaps would take, None where either side cannot have any."""
    specific = disk.root.format_specific()
    if target_format != "qcow2" or disk.format != "qcow2" or specific.get("compat") != "1.1":
        return None
    from cowhand.block.formats.qcow2.measure import bitmaps_size

    known = [(bitmap["name"], bitmap["granularity"]) for bitmap in specific.get("bitmaps", ())]
    return bitmaps_size(known, disk.size, cluster)

"""What another length of a disk would do."""

from __future__ import annotations

from cowhand.core.units import format_size
from cowhand.plans.dependents import Dependents
from cowhand.plans.plan import Plan, Touch


def plan_resize(image: str, old: int, size: int, dependents: Dependents) -> Plan:
    """Return what resizing *image* from *old* to *size* bytes would do, *dependents* reading through it. Nothing is opened or changed."""
    lost = max(0, old - size)
    return Plan(
        action=f"resize {image} from {format_size(old)} to {format_size(size)}",
        writes=[Touch(image, "its length and tables")],
        dependents=dependents,
        warnings=[f"the last {format_size(lost)} of the disk would be lost"] if lost else [],
        undo="none: data that was cut off cannot be restored" if lost else f"cowhand resize --shrink {image} {old}",
    )

"""What a rebase would do."""

from __future__ import annotations

import shlex

from cowhand.block.node.guard import files_of
from cowhand.image.info import image_info
from cowhand.image.open import open_image
from cowhand.jobs.rebase import RebaseResult, change_of
from cowhand.plans.dependents import Dependents
from cowhand.plans.guard import DependentsGuard
from cowhand.plans.plan import Plan, Touch


def plan_rebase(
    image: str,
    backing: str,
    backing_format: str | None,
    result: RebaseResult,
    *,
    format: str | None = None,
    unsafe: bool = False,
    guard: DependentsGuard | None = None,
) -> Plan:
    """Return what :func:`cowhand.rebase` with these arguments would do, *result* being what it returned with ``look=True``. Nothing is changed.

    *guard* says into which further folders is looked for images that depend on what changes.
    """
    writes = [Touch(image, "the name of its backing file")]
    if result.copied or result.zeroes:
        writes.insert(0, Touch(image, "what differs", result.copied + result.zeroes))
    warnings = ["nothing was compared: the image may show other bytes afterwards"] if unsafe else []
    return Plan(
        action=f"give {image} the backing file {backing}"
        if backing
        else f"make {image} independent of its backing file",
        reads=[] if unsafe else [Touch(image, "what may differ", result.compared)],
        writes=writes,
        moves=result.copied,
        dependents=_dependents(image, backing, backing_format, format, unsafe, guard or DependentsGuard()),
        warnings=warnings,
        undo=_undo(image, format, unsafe),
    )


def _undo(image: str, format: str | None, unsafe: bool) -> str:
    """Return what brings the old backing file back."""
    old = image_info(image, format=format, force_share=True)
    words = ["cowhand", "rebase", *(["-u"] if unsafe else []), "-b", old.backing or ""]
    words += ["-F", old.backing_format] if old.backing and old.backing_format else []
    return shlex.join([*words, image]) + (f", while {old.backing} is there and unchanged" if old.backing else "")


def _dependents(
    image: str, backing: str, backing_format: str | None, format: str | None, unsafe: bool, guard: DependentsGuard
) -> Dependents:
    with open_image(image, format=format, backing=False, force_share=True) as disk:
        change = change_of(disk, backing, backing_format, unsafe=unsafe)
        files = files_of(disk.root)
        return guard.look(change._replace(files=files, part=files))

"""Opening an image for users of the library: a disk that is open for writing guards what would change what other images show."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from cowhand.block.locking import device_use
from cowhand.core.errors import ImageInUse
from cowhand.image.open import open_image as _open_image
from cowhand.plans.unclosed import collect, own

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.plans.guard import DependentsGuard

_P = ParamSpec("_P")


def _guard() -> DependentsGuard:
    from cowhand.plans.guard import DependentsGuard

    return DependentsGuard()


def _guarding(function: Callable[_P, Disk]) -> Callable[_P, Disk]:
    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Disk:
        with device_use.refused(default=True):
            try:
                disk = own(function(*args, **kwargs))
            except ImageInUse:
                if not collect():  # a disk of this process that was not closed, and that nothing refers to any more
                    raise
                disk = own(function(*args, **kwargs))
        if not disk.read_only:
            disk.guard = _guard
        return disk

    return call


open_image = _guarding(_open_image)

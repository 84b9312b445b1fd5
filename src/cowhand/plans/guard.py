"""The guard: nothing that other images or snapshots show is changed unless the caller insists."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

from cowhand.block.locking import device_use
from cowhand.block.node.guard import Change
from cowhand.core.errors import CowhandError, OverlaysExist, SearchIncomplete
from cowhand.plans.dependents import Dependents, Search

_P = ParamSpec("_P")
_R = TypeVar("_R")
#: So many of a list are named in a message; the error's facts and the plan have all.
_SHOWN = 5


class DependentsGuard:
    """Looks for what depends on an image, once, and refuses what would change what that shows. Serves one operation; used by one thread.

    *look_in*: folders that are looked into beside those that :func:`cowhand.find_dependents` looks into. *warn* hears of what *force* overrides.
    """

    def __init__(
        self,
        *,
        look_in: Iterable[str | os.PathLike[str]] = (),
        force: bool = False,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._search = Search(look_in)
        self._force = force
        self._warn = warn

    def look(self, change: Change) -> Dependents:
        """Return what depends on the files of *change*."""
        found = self._search.of(change.files, change.part, change.states)
        if change.renamed is None:
            return found
        return found._replace(overlays=(*found.overlays, *self._search.misled(*change.renamed)))

    def refuse(self, change: Change, *, force: bool = False) -> None:
        """Raise OverlaysExist or SearchIncomplete unless *change* harms nothing, or *force* is set (here or for the guard: then warn)."""
        force = force or self._force
        if force and self._warn is None:
            return
        error = self._problem(change, self.look(change))
        if error is None:
            return
        if not force:
            raise error
        if self._warn is not None:
            self._warn(error.message)

    def _problem(self, change: Change, found: Dependents) -> CowhandError | None:
        concerned = (*change.files, *(state.path for state in change.states), *(change.renamed or ())[:1])
        path = concerned[0] if concerned else None
        affected = [*(one.path for one in found.overlays), *found.names()[len(found.paths) :]]
        if affected:
            return OverlaysExist(
                f"{change.doing} would change what {_some(affected)} {'shows' if len(affected) == 1 else 'show'}",
                path=path,
                hint=_advice(found),
                overlays=[one.path for one in found.overlays],
                snapshots=[(state.path, state.name) for state in found.states],
            )
        if found.missed:
            reasons = [f"{name} ({reason})" for name, reason in found.missed]
            return SearchIncomplete(
                f"{change.doing} might change what other images show: whether any reads through it is not known, since not everything could be "
                f"looked at: {_some(reasons)}",
                path=path,
                hint="Make it readable (permissions, a repair), or insist with --force if no image there reads through this one. "
                "Folders without images can be excluded for good: see COWHAND_POOLS in docs/cli.md.",
                missed=list(found.missed),
            )
        return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _advice(found: Dependents) -> str:
    parts = []
    if found.overlays:
        parts.append("Make those images independent first (cowhand rebase -b '' IMAGE, or cowhand convert)")
    if found.states:
        parts.append("Take out the snapshots that are needed (cowhand convert -l NAME), and delete them")
    return "; ".join(parts) + ". Or insist with --force if what they show may be lost."


def guarded(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return *function* with a guard of its own for each call, where the caller gives none."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        kwargs.setdefault("guard", DependentsGuard())
        with device_use.refused(not kwargs.get("force"), default=True):
            return function(*args, **kwargs)

    return call

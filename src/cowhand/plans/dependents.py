"""Who depends on an image: what reads through it, where that was looked for, and what could not be looked at."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from cowhand.block.links.reading import images_of_loop, is_broken, local_targets
from cowhand.block.links.records import BACKING, Link
from cowhand.block.node.guard import KeptState
from cowhand.chain.places import around, block_devices
from cowhand.chain.tree import Reference, Tree
from cowhand.core.identity import Identity, identify, lies_on
from cowhand.drivers import REGISTRY

BLOCK_DEVICES = "block devices"


class Dependents(NamedTuple):
    """What depends on some images. ``overlays`` read directly through one of them, ``indirect`` ones through an overlay.

    ``states`` are internal snapshots that do. ``looked``: the places that were looked into, in words. ``missed``: (path, reason) of what could not be
    looked at, and may depend on them all the same.
    """

    overlays: tuple[Reference, ...] = ()
    indirect: tuple[Reference, ...] = ()
    states: tuple[KeptState, ...] = ()
    looked: tuple[str, ...] = ()
    missed: tuple[tuple[str, str], ...] = ()

    @property
    def paths(self) -> list[str]:
        """The files of all images that depend on them, nearer ones first."""
        return [one.path for one in (*self.overlays, *self.indirect)]

    def names(self) -> list[str]:
        """Return all of them in words: files, and snapshots of files."""
        return [*self.paths, *(f"{one.path}, snapshot {one.name}" for one in self.states)]

    def document(self) -> dict[str, Any]:
        """Return it with the keys that JSON output has."""
        return {
            "dependents": self.paths,
            "dependent-snapshots": [{"filename": one.path, "snapshot": one.name} for one in self.states],
            "looked-in": list(self.looked),
            "not-looked-at": [{"path": path, "reason": reason} for path, reason in self.missed],
        }


class Search:
    """One search for dependents, kept for the length of an operation: no place is looked into twice. *look_in* are further folders."""

    def __init__(self, look_in: Iterable[str | os.PathLike[str]] = ()) -> None:
        self._look_in = tuple(os.fspath(folder) for folder in look_in)
        self.tree = Tree()

    def of(self, files: Iterable[str], part: Iterable[str] = (), states: Iterable[KeptState] = ()) -> Dependents:
        """Return what depends on the local *files*, but for *part* and for images of a loop that one of *files* belongs to."""
        names = [path for path in files if identify(path) is not None]
        found: dict[Identity | None, Reference] = {}
        further: dict[Identity | None, Reference] = {}
        if names:
            self.tree.look(around([*names, *part], self._look_in), block_devices())
            apart = _Apart([*part], {identity for path in names for identity in images_of_loop(path, REGISTRY)})
            for path in names:
                for reference in self.tree.overlays(path):
                    if reference.path not in apart:
                        found.setdefault(identify(reference.path), reference)
            changed = {identify(path) for path in names}
            for path in part:
                if (
                    identify(path) not in changed
                ):  # an image that shows the same, but for one who finds it by another name
                    elsewhere = self.tree.read_otherwise(path, (*names, *part))
                    found |= {Identity("name", name=one.path): one for one in elsewhere}
            for reference in found.values():
                for upper in self.tree.descendants(reference.path):
                    identity = identify(upper.path)
                    if identity not in found and upper.path not in apart:
                        further.setdefault(identity, upper)
        looked = (*self.tree.looked, BLOCK_DEVICES) if names else ()
        missed = tuple(self.tree.unreadable) if names else ()
        return Dependents(tuple(found.values()), tuple(further.values()), tuple(states), looked, missed)

    def misled(self, image: str, backing: str) -> list[Reference]:
        """Return the links to *image* for which *backing*, a name in its header, would mean another file than for *image* itself."""
        link = Link(BACKING, backing)
        own = {identify(target) for target in local_targets(image, link)}
        # A name that means the same everywhere needs no look.
        if local_targets(image, link) == local_targets("/nowhere/image", link):
            return []
        self.tree.look(around([image], self._look_in))
        return [
            Reference(name, "", backing, None, tuple(local_targets(name, link)))
            for name in self.tree.links_to(image)
            if {identify(target) for target in local_targets(name, link)} != own and not is_broken(name, REGISTRY)
        ]


class _Apart:
    """Files that do not count: some, under any name, also the devices that they lie on or that lie on them, and some identities."""

    def __init__(self, paths: list[str], further: set[Identity]) -> None:
        self._own = {identify(path) for path in paths} | further
        self._lower = {identity for path in paths for identity in lies_on(path)}

    def __contains__(self, path: str) -> bool:
        own = identify(path)
        return own in self._own or own in self._lower or bool(lies_on(path) & self._own)


def find_dependents(
    *paths: str | os.PathLike[str], look_in: Iterable[str | os.PathLike[str]] = (), part: Iterable[str] = ()
) -> Dependents:
    """Return the images that read through one of the local images *paths*, and where they were looked for; nothing is changed or locked.

    Headers alone are read: in the folders of *paths* and of *part* and below them, in folders beside those, in *look_in*, in known pools, and on
    block devices. The images of *part* themselves do not count. Never raises for what cannot be read: ``missed`` has it.
    """
    return Search(look_in).of([os.fspath(path) for path in paths], part)

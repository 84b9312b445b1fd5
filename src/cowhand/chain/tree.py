"""Who reads through whom: the images in some folders and on block devices, and which of them stand on which.

A base image does not know its overlays; only their headers name it. So places are searched: of each file the header alone is read, without
locks, and nothing that it names is opened. What cannot be looked at is reported, since it may be an overlay all the same.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from itertools import islice
from typing import ClassVar, NamedTuple

from cowhand.block.links.reading import local_targets, read_links
from cowhand.chain.known_pools import known_pools
from cowhand.chain.places import Device, Place
from cowhand.core.errors import CowhandError
from cowhand.core.identity import Identity, identify, identity_of, lies_on
from cowhand.core.unfinished import is_unfinished

#: Entries of folders that one search looks at, in sum. Beyond that it is not complete, and says so.
MAX_ENTRIES = 200_000
#: Folders below one another that are entered.
_MAX_DEPTH = 64
#: File systems of the kernel: nothing in them is an image.
_KERNEL = ("/proc", "/sys", "/dev")
#: What opening a device without a medium, or one that goes away just now, ends with: it holds no image.
_NO_MEDIUM = (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM, errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
#: A link to a folder is followed, and so many folders further down.
_LINK_DEPTH = 1
#: The specifications allow no shorter header, and no descriptor is as short.
_MIN_SIZE = 64


class Reference(NamedTuple):
    """An image that reads through another file. ``backing`` is the name in its header, ``targets`` are the local files that it may mean.

    ``role``: "backing file", "data file", "extent".
    """

    path: str
    format: str
    backing: str
    backing_format: str | None
    targets: tuple[str, ...]
    role: str = "backing file"


class Tree:
    """The images in the places that were looked into. Each place is looked into once, however often it is asked for; not thread-safe.

    ``unreadable`` lists (path, reason) of what may be an image that reads through others and could not be asked; ``looked`` the places, in words.
    """

    _SKIPPED_ENDS: ClassVar[tuple[str, ...]] = (".cowhand-new",)

    def __init__(self, folders: Iterable[str | os.PathLike[str]] = (), *, limit: int = MAX_ENTRIES) -> None:
        self.references: list[Reference] = []
        self.unreadable: list[tuple[str, str]] = []
        self.looked: list[str] = []
        self.entries = 0  #: entries of folders that were looked at
        self._limit = limit
        self._full = False
        self._targets: dict[str, frozenset[Identity]] = {}
        self._by_own: dict[Identity, list[Reference]] = {}  # by what a target is
        self._by_lower: dict[Identity, list[Reference]] = {}  # by what a target's bytes are kept in
        self._by_path: dict[Identity, list[Reference]] = {}
        self._names: dict[Identity, list[str]] = {}  # of files with several: links, hard links
        self._seen: dict[Identity, int] = {}  # folders, and how deep below them was looked
        self._asked: set[str] = set()  # devices
        self._missed: set[str] = set()
        self._left_out: tuple[str, ...] | None = None
        self.look(Place(os.fspath(folder), 0) for folder in folders)

    # -- looking

    def look(self, places: Iterable[Place], devices: Iterable[Device] = ()) -> None:
        """Look into what of *places* and *devices* was not looked into before."""
        for place in places:
            words = place.folder if place.depth == 0 else f"{place.folder} and below"
            if place.depth:
                words += f" ({place.depth} deep)"
            if self._folder(place) and words not in self.looked:
                self.looked.append(words)
        for device in devices:
            if device.path not in self._asked:
                self._asked.add(device.path)
                self._file(device.path, must=device.must)

    def _folder(self, place: Place) -> bool:
        """Look into a place; tell whether it is there."""
        identity = identify(place.folder)
        if identity is None:
            return False
        stack = [(place.folder, _MAX_DEPTH if place.depth is None else place.depth)]
        while stack and not self._full:
            folder, depth = stack.pop()
            stack += reversed(self._enter(folder, depth))
        return True

    def _enter(self, folder: str, depth: int) -> list[tuple[str, int]]:
        """Look at the files of *folder* unless that was done; return the folders in it that are to be entered, with their depths."""
        identity = identify(folder)
        if identity is None:
            return []
        before = self._seen.get(identity, -1)
        if before >= depth:
            return []
        self._seen[identity] = depth
        if before < 0 and self._is_left_out(folder):
            self._seen[identity] = _MAX_DEPTH
            return []
        below: list[tuple[str, int]] = []
        try:
            with os.scandir(folder) as entries:
                most = self._limit - self.entries + 1 if before < 0 else None
                found = sorted(islice(entries, most), key=lambda entry: entry.name)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._miss(folder, os.strerror(error.errno or 0))
            return []
        if before < 0:
            self.entries += len(found)
            if self.entries > self._limit:
                self._full = True
                self._miss(folder, f"more than {self._limit} files and folders were to be looked at")
                return []
        for entry in found:
            path = entry.name if folder == os.curdir else os.path.join(folder, entry.name)
            if self._is_folder(entry):
                if depth:
                    below.append((path, min(depth - 1, _LINK_DEPTH) if entry.is_symlink() else depth - 1))
            elif before < 0 and not is_unfinished(entry.name):
                # What is being made, or was left half made, is no image yet.
                self._entry(entry, path)
        return below

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:
            return False

    def _is_left_out(self, folder: str) -> bool:
        if self._left_out is None:
            self._left_out = (*_KERNEL, *known_pools().left_out)
        real = os.path.realpath(folder)
        return any(real == name or real.startswith(f"{name}/") for name in self._left_out) and not real.startswith(
            "/dev/shm"
        )

    def _entry(self, entry: os.DirEntry[str], path: str) -> None:
        if path.endswith(self._SKIPPED_ENDS):
            return
        try:
            status = entry.stat()
        except OSError as error:
            if error.errno not in _NO_MEDIUM:  # else a link to nothing, or gone meanwhile
                self._miss(path, os.strerror(error.errno or 0))
            return
        if entry.is_symlink() or status.st_nlink > 1:
            self._names.setdefault(identity_of(status), []).append(path)
        if (stat.S_ISREG(status.st_mode) and status.st_size >= _MIN_SIZE) or stat.S_ISBLK(status.st_mode):
            self._file(path)

    def _file(self, path: str, *, must: bool = True) -> None:
        from cowhand.drivers import REGISTRY

        try:
            found = read_links(path, REGISTRY)
        except CowhandError as error:
            self._miss(path, error.message)
            return
        except OSError as error:
            if error.errno not in _NO_MEDIUM and (must or not isinstance(error, PermissionError)):
                self._miss(path, os.strerror(error.errno or 0))
            return
        for link in found.links:
            targets = tuple(local_targets(path, link))
            reference = Reference(path, found.format, link.name, link.format, targets, link.role)
            self.references.append(reference)
            identity = identify(path)
            if identity is not None:
                self._by_path.setdefault(identity, []).append(reference)
            for target in targets:
                self._index(target, reference)

    def _index(self, target: str, reference: Reference) -> None:
        lower = self._targets.get(target)
        if lower is None:
            lower = self._targets[target] = lies_on(target)
        own = identify(target)
        if own is not None:
            self._by_own.setdefault(own, []).append(reference)
            for identity in lower - {own}:
                self._by_lower.setdefault(identity, []).append(reference)

    def _miss(self, path: str, reason: str) -> None:
        if path not in self._missed:  # a folder that is entered once more, for what lies deeper
            self._missed.add(path)
            self.unreadable.append((path, reason))

    # -- asking

    def overlays(self, path: str | os.PathLike[str]) -> list[Reference]:
        """Return the images that read directly through *path*, but for itself, each file once, in the order in which they were found.

        A device and what it lies on (a loop device's file, a partition's disk) count as one.
        """
        own = identify(path)
        if own is None:
            return []
        found = list(self._by_lower.get(own, ()))
        for under in sorted(lies_on(path)):
            found += self._by_own.get(under, ())
        files: dict[Identity, Reference] = {}
        for one in found:
            identity = identify(one.path)
            if identity is not None and identity != own:
                files.setdefault(identity, one)
        return list(files.values())

    def links_to(self, path: str) -> list[str]:
        """Return the links and hard links that were found of the file *path*."""
        identity = identify(path)
        return [] if identity is None else self._names.get(identity, [])

    def read_otherwise(self, path: str, files: Iterable[str]) -> list[Reference]:
        """Return where *path*, found by another name in another folder, reads through a file that is there and none of *files*.

        A relative name in its header means something else there.
        """
        identity = identify(path)
        known = {identify(name) for name in files}
        found = [] if identity is None else self._by_path.get(identity, ())
        there = [(one, {identify(target) for target in one.targets} - {None}) for one in found]
        return [one for one, targets in there if targets and not targets & known]

    def descendants(self, path: str | os.PathLike[str]) -> list[Reference]:
        """Return all images that read through *path*, directly or through others that do; nearer ones first, each file once."""
        found: list[Reference] = []
        seen: set[Identity | None] = {identify(path)}
        queue = self.overlays(path)
        while queue:
            reference = queue.pop(0)
            identity = identify(reference.path)
            if identity in seen:
                continue
            seen.add(identity)
            found.append(reference)
            queue.extend(self.overlays(reference.path))
        return found

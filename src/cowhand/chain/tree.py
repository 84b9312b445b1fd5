"""Who depends on whom: the images in some folders, and which of them stand on which.

A base image does not know its overlays; only their headers name it. So folders are searched: of each file the header alone is read, without
locks, and nothing that it names is opened. A file that cannot be read is reported, since it may be an overlay all the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from cowhand.block.opening.filenames import combine, has_protocol
from cowhand.block.opening.registry import PROBE_SIZE
from cowhand.core.errors import CowhandError

#: Bytes of a file that its header and the name of its base are looked for in, at first.
_HEADER_SIZE = 1 << 16
#: A header's first cluster is no longer than this in any format.
_HEADER_LIMIT = 1 << 21
#: How deep descriptions in ``json:`` names may be nested before they are given up.
_JSON_DEPTH = 50

Identity = tuple[int, int]


class OverlaysExist(CowhandError):
    """Other images stand on this one, and what was asked would change what they read."""

    code = "has-overlays"
    exit_code = 9


class Reference(NamedTuple):
    """An image that stands on another one. ``backing`` is the name in its header, ``target`` the local file meant, or None."""

    path: str
    format: str
    backing: str
    backing_format: str | None
    target: str | None


class Tree:
    """The images in *folders* (not in folders inside them). Reads headers once, when it is made; not thread-safe.

    ``unreadable`` lists (path, reason) of images that may stand on others, and that could not be asked.
    """

    _SKIPPED_ENDS: ClassVar[tuple[str, ...]] = (".cowhand-new",)

    def __init__(self, folders: Iterable[str | os.PathLike[str]]) -> None:
        self.references: list[Reference] = []
        self.unreadable: list[tuple[str, str]] = []
        self._by_target: dict[Identity, list[Reference]] = {}
        seen: set[str] = set()
        for folder in folders:
            real = os.path.realpath(folder)
            if real not in seen:
                seen.add(real)
                self._scan(os.fspath(folder))

    def overlays(self, path: str | os.PathLike[str]) -> list[Reference]:
        """Return the images that stand directly on *path*, in the order of their names."""
        identity = identify(path)
        return list(self._by_target.get(identity, ())) if identity is not None else []

    def descendants(self, path: str | os.PathLike[str]) -> list[Reference]:
        """Return all images that stand on *path*, directly or on others that do; nearer ones first, each once."""
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

    def _scan(self, folder: str) -> None:
        for path in _files(folder):
            if path.endswith(self._SKIPPED_ENDS):
                continue
            try:
                reference = read_reference(path)
            except CowhandError as error:
                self.unreadable.append((path, error.message))
                continue
            except OSError as error:
                self.unreadable.append((path, os.strerror(error.errno or 0)))
                continue
            if reference is None:
                continue
            self.references.append(reference)
            identity = identify(reference.target) if reference.target is not None else None
            if identity is not None:
                self._by_target.setdefault(identity, []).append(reference)


def identify(path: str | os.PathLike[str]) -> Identity | None:
    """Return what tells the file from all others, whatever its name; None when it is not there."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino


def folder_of(path: str | os.PathLike[str]) -> str:
    """Return the folder that the file *path* lies in, links of the file itself followed; written as *path* is."""
    name = os.path.realpath(path) if os.path.islink(path) else os.fspath(path)
    return os.path.dirname(name) or os.curdir


def _files(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
    except OSError:
        return
    for name in names:
        yield name if folder == os.curdir else os.path.join(folder, name)


def read_reference(path: str) -> Reference | None:
    """Return what the image *path* stands on, from its header alone; None when it stands on nothing, or is no image of a kind that can.

    Raises CowhandError for a broken header, OSError when the file cannot be read.
    """
    # Not blocking: the file may have become a pipe since it was looked at.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        head = os.pread(descriptor, PROBE_SIZE, 0)
        from cowhand.drivers import REGISTRY

        if REGISTRY.probe(head, path).name != "qcow2":
            return None
        return _qcow2(path, descriptor)
    finally:
        os.close(descriptor)


def _qcow2(path: str, descriptor: int) -> Reference | None:
    from cowhand.block.formats.qcow2.ondisk.header import parse

    head = os.pread(descriptor, _HEADER_SIZE, 0)
    try:
        header = parse(head, path)
    except CowhandError:
        if len(head) < _HEADER_SIZE:
            raise
        header = parse(os.pread(descriptor, _HEADER_LIMIT, 0), path)
    if not header.backing_name:
        return None
    return Reference(path, "qcow2", header.backing_name, header.backing_format, local_target(path, header.backing_name))


def local_target(owner: str, name: str) -> str | None:
    """Return the local file that *name*, written in the image *owner*, means; None when it lies elsewhere."""
    if name.startswith("json:"):
        try:
            described = _filename(json.loads(name[5:]), _JSON_DEPTH)
        except (ValueError, RecursionError):
            return None
        if described is None:
            return None
        name = described
    try:
        found = combine(owner, name)
    except CowhandError:
        return None
    if found.startswith("file:"):
        return found[5:]
    return None if has_protocol(found) else found


def _filename(description: Any, depth: int) -> str | None:
    """Return the file name at the bottom of a description in QEMU's form."""
    while isinstance(description, dict) and depth:
        depth -= 1
        for key in ("filename", "file.filename", "file.file.filename"):
            if isinstance(description.get(key), str):
                return str(description[key])
        description = description.get("file")
    return None


def refuse_if_needed(
    path: str | os.PathLike[str],
    doing: str,
    *,
    folders: Sequence[str] = (),
    apart: Iterable[str] = (),
) -> list[str]:
    """Raise OverlaysExist when images in the folder of *path*, or in *folders*, stand on it; those in *apart* do not count.

    *doing* says what would harm them ("committing into it"). Returns the images in these folders that could not be asked.
    """
    tree = Tree([folder_of(path), *folders])
    known = {identify(name) for name in apart}
    others = [reference.path for reference in tree.overlays(path) if identify(reference.path) not in known]
    if not others:
        return [name for name, _ in tree.unreadable]
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    raise OverlaysExist(
        f"other images stand on '{os.fspath(path)}', and {doing} would change what they read: {shown}",
        path=os.fspath(path),
        hint="Convert them into images of their own first (cowhand convert), or insist with --force if they may be lost.",
        overlays=others,
    )

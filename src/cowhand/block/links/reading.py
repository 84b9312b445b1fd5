"""From an image's name to the files that it reads through: what its format's reader of links says, as names of local files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.links.records import Link, Reader
from cowhand.block.opening.filenames import combine, has_protocol
from cowhand.block.opening.registry import PROBE_SIZE
from cowhand.block.opening.signatures import looks_like_a_format
from cowhand.core.errors import ChainLoop, CowhandError, InvalidArgument, SearchIncomplete, from_os_error
from cowhand.core.identity import Identity, identify_name

if TYPE_CHECKING:
    from cowhand.block.opening.registry import Registry

#: How deep descriptions in ``json:`` names may be nested before they are given up.
_JSON_DEPTH = 50
#: Files below one image that are followed to find a loop.
_MAX_FILES = 4096


class Found(NamedTuple):
    """What a file names: its ``format``, and its links."""

    format: str
    links: list[Link]


def read_links(path: str, registry: Registry) -> Found:
    """Return what the file *path* names; nothing is opened but the file itself, for reading and without locks.

    Raises CowhandError where the header is damaged so that it cannot be known, OSError when the file cannot be read.
    """
    # Not blocking: the file may have become a pipe since it was looked at.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        head = os.pread(descriptor, PROBE_SIZE, 0)
        entry = registry.probe(head, path)
        name = entry.name
        if name == "raw":
            name = looks_like_a_format(head) or "raw"
        module = entry.links
        if not module:
            return Found(name, [])
        links: list[Link] = importlib.import_module(module).links(Reader(descriptor, path))
        return Found(name, links)
    finally:
        os.close(descriptor)


def local_targets(owner: str, link: Link) -> list[str]:
    """Return the local files that *link*, found in the image *owner*, may mean; none where it means no file of this system.

    Where it depends on who opens the image (a relative name in a description, or of a data file) there are several.
    """
    if link.plain:
        return _both(owner, link.name)
    if link.name.startswith("json:"):
        from cowhand.block.opening.json_names import parse_json_name

        try:
            names = list(_file_names(parse_json_name(link.name), _JSON_DEPTH))
        except CowhandError:
            return []
        return list(dict.fromkeys(target for name in names for target in _both(owner, name)))
    try:
        found = combine(owner, link.name)
    except CowhandError:
        return []
    path = _local(found)
    return [] if path is None else [path]


def _both(owner: str, name: str) -> list[str]:
    """Return *name* as it is relative to the working directory, and as it is relative to *owner*."""
    path = _local(name)
    if path is None:
        return []
    return list(dict.fromkeys((path, os.path.join(os.path.dirname(owner), path))))


def _local(name: str) -> str | None:
    for prefix in ("file:", "host_device:", "host_cdrom:"):
        if name.startswith(prefix):
            return name[len(prefix) :]
    return None if has_protocol(name) else name


def _file_names(description: Any, depth: int) -> Iterator[str]:
    """Yield every file name in a description in QEMU's form: a filter or a quorum has several."""
    if not depth:
        return
    if isinstance(description, list):
        for item in description:
            yield from _file_names(item, depth - 1)
    elif isinstance(description, dict):
        for key, value in description.items():
            if isinstance(value, (dict, list)):
                yield from _file_names(value, depth - 1)
            elif isinstance(value, str) and key.rpartition(".")[2] in ("filename", "file", "backing", "raw", "image"):
                yield value


def reads_through(link: Link, owner: str, image: str, registry: Registry) -> bool:
    """Tell whether *link*, written in *owner*, means *image*, which need not exist yet, or what reads through it.

    Raises CowhandError and OSError where a file on the way is there and cannot be read.
    """
    wanted = identify_name(image)
    seen: set[Identity] = set()
    queue = [(target, link.format) for target in local_targets(owner, link)]
    while queue:
        path, format = queue.pop()
        identity = identify_name(path)
        if identity == wanted:
            return True
        if identity in seen or identity.kind == "name" or format == "raw":
            continue
        seen.add(identity)
        if len(seen) > _MAX_FILES:
            raise InvalidArgument(f"more than {_MAX_FILES} images lie below it", path=path)
        for below in read_links(path, registry).links:
            queue += [(target, below.format) for target in local_targets(path, below)]
    return False


def refuse_loop(image: str, link: Link, registry: Registry, *, force: bool = False) -> None:
    """Raise ChainLoop when *image*, which need not exist yet, would read through itself if it named *link*.

    *force* goes on where that cannot be found out (SearchIncomplete otherwise); it never allows a loop.
    """
    try:
        loops = reads_through(link, image, image, registry)
    except (CowhandError, OSError) as error:
        if force:
            return
        known = error if isinstance(error, CowhandError) else from_os_error(error)
        raise SearchIncomplete(
            f"'{image}' might read through itself then: what '{link.name}' reads through cannot be found out ({known.message})",
            path=image,
            hint="Name the backing file as the one who may read it, or insist with --force if it cannot be so.",
        ) from error
    if loops:
        itself = any(identify_name(target) == identify_name(image) for target in local_targets(image, link))
        why = "is that image itself" if itself else "reads through that image"
        raise ChainLoop(
            f"'{image}' cannot read through '{link.name}', which {why}: no image of the loop could be opened any more",
            path=image,
            hint="Name another backing file. What an image reads through is told by: cowhand info --chain",
        )


def is_broken(image: str, registry: Registry) -> bool:
    """Tell whether *image* cannot show anything now: something that it reads through is not there, or comes back to a file above it."""
    seen: set[Identity] = set()
    queue: list[tuple[str, frozenset[Identity]]] = [(image, frozenset())]
    while queue:
        path, above = queue.pop()
        identity = identify_name(path)
        if identity.kind == "name" or identity in above:
            return True
        if identity in seen or len(seen) > _MAX_FILES:
            continue
        seen.add(identity)
        try:
            links = read_links(path, registry).links
        except (CowhandError, OSError):
            return False  # nobody knows
        for link in links:
            targets = local_targets(path, link)
            if not targets:
                continue
            there = [target for target in targets if identify_name(target).kind != "name"]
            if not there:
                return True
            queue += [(target, above | {identity}) for target in there]
    return False


def images_of_loop(image: str, registry: Registry) -> list[Identity]:
    """Return what *image* reads through where that leads back to *image*, each image of that way; nothing where there is no such loop."""
    own = identify_name(image)
    above: dict[Identity, set[Identity]] = {}
    seen: set[Identity] = set()
    queue = [image]
    while queue and len(seen) <= _MAX_FILES:
        path = queue.pop()
        identity = identify_name(path)
        if identity in seen or identity.kind == "name":
            continue
        seen.add(identity)
        try:
            links = read_links(path, registry).links
        except (CowhandError, OSError):
            continue
        for link in links:
            for target in local_targets(path, link):
                above.setdefault(identify_name(target), set()).add(identity)
                queue.append(target)
    # From the image upwards, as far as that stays among what it reads through.
    found: set[Identity] = set()
    steps = list(above.get(own, ()))
    while steps:
        identity = steps.pop()
        if identity not in found:
            found.add(identity)
            steps += above.get(identity, ())
    return list(found)

"""Files that a new image is made of beside its own: extents, named after the image and made before it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.core.errors import ImageExists, from_os_error

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.block.opening.registry import Registry


def refuse_existing(paths: list[str]) -> None:
    """Raise ImageExists when something has the name of an extent."""
    for path in paths:
        if os.path.lexists(path):
            raise ImageExists(
                f"the extent '{path}' exists already",
                path=path,
                hint="Choose another name, or insist on overwriting it.",
            )


class Extents:
    """The making of *paths* for an image that *creator* makes. As a context manager it removes what is new when the image fails."""

    def __init__(self, creator: type[BlockNode], paths: list[str], registry: Registry, *, durable: bool) -> None:
        self._creator, self._paths, self._registry, self._durable = creator, paths, registry, durable
        self._new: list[str] = []

    def make(self, size: int, options: Mapping[str, Any]) -> None:
        """Make the files, empty ones first; the format fills each (``create_extent``). Raises CowhandError."""
        from cowhand.block.graph import graph
        from cowhand.block.opening.filenames import FileName
        from cowhand.block.opening.opening import Opening

        for number, path in enumerate(self._paths):
            if not os.path.lexists(path):
                self._new.append(path)
            cls: Any = self._registry.get("file").load()
            cls.create(path, 0)
            node = Opening(self._registry, backing=False).open(
                {"driver": "file", "filename": FileName(path), "read-only": False, "cache.no-flush": not self._durable}
            )
            try:
                self._creator.create_extent(node, number, size, options)
            finally:
                graph.close_node(node)

    def __enter__(self) -> Extents:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        for path in self._new:
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as second:
                error.add_note(str(from_os_error(second, path, doing="removing the unfinished extent")))

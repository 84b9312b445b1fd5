"""Telling that a copy would be written over its own source, or over what the source reads through, whatever names they go by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.block.node.guard import LOCAL_DRIVERS
from cowhand.block.node.node import Role
from cowhand.core.errors import InvalidArgument
from cowhand.core.identity import identify, lies_on

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.node import BlockNode


def refuse_own_source(disks: Sequence[Disk], target: str | None) -> None:
    """Raise InvalidArgument when writing *target* would change what one of *disks* reads: the same file or device, or one over or under the other."""
    own = identify(target) if target is not None else None
    if own is None or target is None:
        return
    below = lies_on(target)
    for disk in disks:
        for path, depth in _files(disk.root):
            file = identify(path)
            if file is None or (file not in below and own not in lies_on(path)):
                continue
            same = (
                ""
                if path == target
                else f" ('{path}' by another name)"
                if file == own
                else f" (it lies on '{path}')"
                if file in below
                else f" ('{path}' lies on it)"
            )
            if depth:
                message = f"the target '{target}' is an image that the source '{disk.filename}' reads through{same}"
            else:
                message = f"the target '{target}' is the source itself{same}"
            raise InvalidArgument(message, path=target, hint="Copy to another name; the source stays as it is.")


def _files(root: BlockNode) -> Iterator[tuple[str, int]]:
    """Yield the local files and devices that *root* reads, each with the number of backing links above it."""
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        if node.driver in LOCAL_DRIVERS:
            yield node.filename, depth
        stack += [
            (child.node, depth + (child.role is Role.BACKING)) for child in reversed(list(node.children.values()))
        ]

"""What an operation asks before it changes what an image shows: whether other images, or snapshots, read through it.

The answer needs the folders and pools around, which this layer knows nothing of: ``cowhand.plans`` has the guard that looks. The compatible tools
have none, as QEMU has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

#: Protocol drivers whose ``filename`` is the path of a file or device of this system.
LOCAL_DRIVERS = ("file", "host_device", "host_cdrom")


class KeptState(NamedTuple):
    """An internal snapshot, by the file of its image and its name (or id)."""

    path: str
    name: str


class Change(NamedTuple):
    """What an operation is going to change for others.

    ``doing`` says what it does ("committing into base.qcow2"). ``files``: the local files whose content others will read otherwise. ``part``: files
    of images that the operation itself takes care of. ``states``: internal snapshots that read through what changes. ``renamed``: an image, and the
    name of a backing file that its header is going to have. For a link to the image in another folder a relative name means another file.
    """

    doing: str
    files: tuple[str, ...] = ()
    part: tuple[str, ...] = ()
    states: tuple[KeptState, ...] = ()
    renamed: tuple[str, str] | None = None


def change_of(node: BlockNode, doing: str) -> Change:
    """Return that *node*'s own content changes, and nothing else."""
    files = files_of(node)
    return Change(doing, files, files)


class Guard(Protocol):
    """Whoever looks for dependents. One guard serves one operation, and looks once."""

    def refuse(self, change: Change, *, force: bool = False) -> None:
        """Raise OverlaysExist when *change* would harm others, SearchIncomplete when that cannot be told; with *force* warn at most."""


def files_of(node: BlockNode) -> tuple[str, ...]:
    """Return the local files and devices that keep *node*'s own bytes, its data file among them, and no backing file's."""
    from cowhand.block.node.node import Role

    found: dict[str, None] = {}
    stack = [node]
    while stack:
        at = stack.pop()
        if at.driver in LOCAL_DRIVERS:
            found[at.filename] = None
        stack += [child.node for child in reversed(list(at.children.values())) if child.role is not Role.BACKING]
    return tuple(found)

"""What stands above the graph: a disk with the edge by which it uses its root node, and owners that keep a node open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cowhand.block.node.node import BlockNode, Edge, Role

if TYPE_CHECKING:
    from cowhand.block.graph.drain import Gate
    from cowhand.core.errors import CowhandError


class DiskListener:
    """Hears of what happens to a disk. The methods are called inside a drain or after a request: no I/O, no waiting."""

    def resized(self, disk: GraphUser, size: int) -> None:
        """*disk* has *size* bytes now."""

    def replaced(self, disk: GraphUser, root: BlockNode) -> None:
        """*disk* reads and writes *root* now."""

    def failed(self, disk: GraphUser, error: CowhandError) -> None:
        """*disk*'s image is not written any more, by *error*, until it is opened again."""

    def closed(self, disk: GraphUser) -> None:
        """*disk* was closed."""


class GraphUser(Protocol):
    """What the graph asks of a disk (:class:`cowhand.block.disk.Disk`)."""

    name: str
    read_only: bool
    write_through: bool
    resizable: bool
    gate: Gate
    edge: UserEdge
    in_flight: dict[int, tuple[str, int, int, int]]
    listeners: tuple[DiskListener, ...]

    @property
    def root(self) -> BlockNode:
        """The node that the disk reads and writes."""

    def root_changed(self) -> None:
        """Learn the root's size anew; called with the gate shut."""


class UserEdge(Edge):
    """A disk's use of its root node."""

    __slots__ = ("user",)

    def __init__(self, user: GraphUser) -> None:
        super().__init__("root", Role.FILTERED)
        self.user = user

    @property
    def owner(self) -> GraphUser:
        return self.user


class OwnerEdge(Edge):
    """Keeps a node open for *owner* (a monitor), without any permission; drains do not see it, and it never moves to another node."""

    __slots__ = ("keeper",)

    def __init__(self, keeper: str) -> None:
        super().__init__("owner", Role.FILTERED)
        self.keeper = keeper

    @property
    def owner(self) -> str:
        return self.keeper

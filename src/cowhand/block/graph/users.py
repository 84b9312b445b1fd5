"""What stands above the graph: a disk, and the edge by which it uses its root node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cowhand.block.node.node import BlockNode, Edge, Role

if TYPE_CHECKING:
    from cowhand.block.graph.drain import Gate


class GraphUser(Protocol):
    """What the graph asks of a disk (:class:`cowhand.block.disk.Disk`)."""

    name: str
    read_only: bool
    resizable: bool
    write_through: bool
    gate: Gate
    edge: UserEdge
    in_flight: dict[int, tuple[str, int, int, int]]

    @property
    def root(self) -> BlockNode:
        """The node that the disk reads and writes."""

    def root_changed(self) -> None:
        """Learn the root's size and limits anew; called with the gate shut."""


class UserEdge(Edge):
    """A disk's use of its root node."""

    __slots__ = ("user",)

    def __init__(self, user: GraphUser) -> None:
        super().__init__("root", Role.FILTERED)
        self.user = user

    @property
    def owner(self) -> GraphUser:
        return self.user

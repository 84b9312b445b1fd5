"""Binding an edge: the shortest way from a user to its node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.access.aligned import AlignedAccess
from cowhand.block.access.hooked import HookedAccess

if TYPE_CHECKING:
    from cowhand.block.access.zero_detection import DetectingAccess
    from cowhand.block.node.node import BlockNode, Edge


def bind(edge: Edge) -> None:
    """Set the methods of *edge*: padded only where alignments differ, hooked only where the node has hooks.

    Called under the graph's lock, and inside a drain of the disks above where requests may be in flight.
    """
    node = edge.node
    access: BlockNode | HookedAccess | DetectingAccess = node
    if node.hooks:
        access = HookedAccess(node)
    if node.options.detect_zeroes != "off" and not node.detects_zeroes:
        from cowhand.block.access.zero_detection import DetectingAccess

        access = DetectingAccess(node, access)
    if node.limits.request_alignment > edge.granularity:
        edge.lane = None
        _set_methods(edge, AlignedAccess(node, access))
    else:
        edge.lane = node if access is node else None
        _set_methods(edge, access)


def _set_methods(edge: Edge, access: BlockNode | HookedAccess | DetectingAccess | AlignedAccess) -> None:
    edge.read_into = access.read_into
    edge.write = access.write
    edge.write_zeroes = access.write_zeroes
    edge.discard = access.discard
    edge.flush = edge.node.flush
    edge.submit = access.submit


def rebind_parents(node: BlockNode) -> None:
    """Bind all edges to *node* anew, after its limits or hooks changed."""
    for edge in node.parents:
        bind(edge)


def refit(node: BlockNode) -> None:
    """Have *node*, and all that stands above it, work out limits and capabilities anew after something below changed."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        current.refit()
        rebind_parents(current)
        pending.extend(edge.owner for edge in current.parents if edge.is_child)

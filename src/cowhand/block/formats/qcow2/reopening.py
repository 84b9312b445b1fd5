"""Reopening a qcow2 image in place: what is in memory reaches the file before writing ends, and is looked at again before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.close import write_what_is_left
from cowhand.block.formats.qcow2.metadata.options import Qcow2Options, check_options
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.open import refuse_unsupported
from cowhand.block.node.node import Reopening

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


class Qcow2Reopening(Reopening):
    """The part of one image. An image whose writing was ended, but that stays writable after all, begins anew with its next change."""

    node: Qcow2Node

    def __init__(self, node: Qcow2Node, options: Qcow2Options, writable: bool) -> None:
        super().__init__(node, options, writable)
        check_options(options, node.header, 16 if node.extended else 8)
        lazier = options.lazy_refcounts != node.options.lazy_refcounts
        if node.begun and (not writable or lazier):
            write_what_is_left(node)
            node.end_writing()
        self._limits = node.mapping.cache.limit, node.refcounts.cache.limit

    def commit(self) -> None:
        super().commit()
        self.node.set_cache_limits()

    def undo(self) -> None:
        super().undo()
        self.node.mapping.cache.limit, self.node.refcounts.cache.limit = self._limits

    def activate(self) -> None:
        node = self.node
        if not node.writable or self._before[1]:
            return
        refuse_unsupported(node.header, node.filename, writable=True)
        if node.snapshots_problem is not None:
            raise node.snapshots_problem
        if node.header.incompatible & L.INCOMPAT_DIRTY:
            from cowhand.block.formats.qcow2.open import repair_dirty

            repair_dirty(node)

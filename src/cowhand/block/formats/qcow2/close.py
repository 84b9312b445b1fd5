"""Closing a qcow2 image that was written: bitmaps, tables and counts reach the file, the dirty bit leaves it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, ImageCorrupt

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def write_what_is_left(node: Qcow2Node) -> None:
    """Make the file of *node*, which nobody uses any more, complete. Raises the first error, after trying the rest."""
    if not node.writable or not node.begun:
        return
    if isinstance(node.poison, ImageCorrupt):
        return  # it was said when it was found, and nothing may be written
    failure = _store_bitmaps(node)
    if node.poison is not None and node.poison.facts.get("told"):
        if failure is not None:
            raise failure
        return  # what reached the file is whole, and the user was told what did not
    if node.external and not node.data_missing:
        # Tables that name what is not stable stay back.
        node.data_child.flush()
    steps = [("L2 table", node.flush), ("refcount block", lambda: _close_counts(node))]
    if node.unprotected:
        # All writing was refused, so that no table was changed; counts that were taken back are all there is.
        del steps[0]
    for what, step in steps:
        try:
            step()
        except CowhandError as error:
            diagnostics.report(f"Failed to flush the {what} cache: {os.strerror(error.errno or 5)}", as_tool=True)
            failure = failure or error
    if failure is not None:
        raise failure


def _store_bitmaps(node: Qcow2Node) -> CowhandError | None:
    """Write the persistent bitmaps; where that fails the image says that they are out of date, and the error is told and returned."""
    if not node.bitmap_directory.entries and not node.bitmap_directory.changed:
        return None
    from cowhand.block.formats.qcow2.bitmap.store import store

    try:
        store(node)
    except CowhandError as error:
        text = f"Lost persistent bitmaps during inactivation of node '{node.name}': {error.qemu()}"
        diagnostics.report(text, as_tool=True)
        return error
    return None


def _close_counts(node: Qcow2Node) -> None:
    # Nobody is left who could reach what was freed.
    node.release_quarantine(everything=True)
    if node.lazy:
        node.flush_counts()
    node.flush()
    if node.lazy:
        node.set_incompatible(node.header.incompatible & ~L.INCOMPAT_DIRTY)

"""The contract of formats that name a backing file: overlays, made by the driver over any node."""

from __future__ import annotations

from pathlib import Path

import cowhand
from cowhand.block.node.node import BlockNode
from tests.formats.contracts import QemuWrites


class QemuOverlays(QemuWrites):
    """Writing images over a backing file as well."""

    def make_overlay(self, folder: Path, backing: BlockNode, size: int) -> BlockNode:
        image = folder / f"disk.{self.driver}"
        options = dict(pair.split("=") for pair in self.options.split(",")) if self.options else {}
        cowhand.create(image, self.driver, size, options)
        return self.open_again(folder, backing=backing)

"""Names of images, as users write them and as headers have them: protocols, and what a relative name is relative to. No I/O."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

_PROTOCOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.\-_]*:")
#: Protocols whose names have no folder: another name beside them would be another export.
_WITHOUT_FOLDERS = ("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix")


def has_protocol(name: str) -> bool:
    """Tell whether *name* begins with a protocol ("nbd:"), as QEMU decides it: a colon before the first slash."""
    return _PROTOCOL.match(name) is not None and "/" not in name.split(":", 1)[0]


def combine(base: str, name: str) -> str:
    """Return the file that *name*, written in an image called *base*, means: relative names are relative to the image's directory."""
    if has_protocol(name) or os.path.isabs(name):
        return name
    if base.startswith("json:"):
        raise InvalidArgument(
            f"Cannot use relative backing file names for '{base}'", hint="Name the file with its whole path.", path=base
        )
    prefix = ""
    if has_protocol(base):
        protocol, _, rest = base.partition(":")
        if protocol in _WITHOUT_FOLDERS:
            raise InvalidArgument(
                "Cannot generate a base directory for NBD nodes", hint="Name the file with its whole path.", path=base
            )
        if protocol == "file":
            base = rest
        else:
            prefix, base = base[: len(base) - len(rest)], rest
    return prefix + os.path.join(os.path.dirname(base), name)


def location(node: BlockNode) -> str:
    """Return the name that names in *node*'s header are relative to: that of the file at the bottom, whatever lies between."""
    return bottom(node).filename


def bottom(node: BlockNode) -> BlockNode:
    """Return the node that keeps *node*'s own bytes, whatever lies between: the end of the way by primary children."""
    primary = node.primary
    while primary is not None:
        node = primary.node
        primary = node.primary
    return node


class FileName(str):
    """A name as users write it, which may begin with a protocol. The option "filename" of a description is a plain string: a path as it is."""

    __slots__ = ()

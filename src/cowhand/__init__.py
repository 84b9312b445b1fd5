"""cowhand: virtual-machine disk storage in Python. Images, backing chains, snapshots; safe, and with a plan first.

>>> import cowhand
>>> with cowhand.open("disk.qcow2") as disk:
...     boot_sector = disk.read(0, 512)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.__about__ import __version__

if TYPE_CHECKING:
    import os

    from cowhand.block.disk import Disk
    from cowhand.block.policy import Policy


def open(
    what: str | os.PathLike[str] | Mapping[str, Any],
    *,
    writable: bool = False,
    format: str | None = None,
    backing: bool = True,
    cache: str = "writeback",
    force_share: bool = False,
    resizable: bool | None = None,
    policy: Policy | None = None,
    options: Mapping[str, Any] | None = None,
    secrets: Mapping[str, bytes | str] | None = None,
) -> Disk:
    """Open an image, with what lies under it, and return a :class:`cowhand.block.disk.Disk`.

    *what* is a path, a ``json:`` or ``PROTOCOL:`` name, or a description in QEMU's form ({"driver": "qcow2", "file": {...}}). *format* names the
    format instead of guessing it from the first bytes; a guessed raw image is opened for writing only as a block-wise copy of itself would
    be: its first sector may not become another format's header. *cache* is one of none, writethrough, writeback, directsync, unsafe.
    *force_share* takes no locks. *policy* says what the image itself may have opened. *secrets* are the passphrases that ``key-secret`` options
    name, by id; none of them is part of a message or a name. Raises CowhandError; nothing stays open then.
    """
    from cowhand.block.disk import Disk
    from cowhand.block.opening import Opening
    from cowhand.block.options import CACHE_MODES
    from cowhand.block.policy import DEFAULT
    from cowhand.core.errors import InvalidArgument
    from cowhand.drivers import REGISTRY

    modes = CACHE_MODES.get(cache)
    if modes is None:
        raise InvalidArgument(f"Invalid cache mode '{cache}'", hint="One of: " + ", ".join(CACHE_MODES))
    write_through, direct, no_flush = modes
    common: dict[str, Any] = {"read-only": not writable}
    if direct:
        common["cache.direct"] = True
    if no_flush:
        common["cache.no-flush"] = True
    if force_share:
        common["force-share"] = True
    opening = Opening(REGISTRY, policy or DEFAULT, backing=backing)
    if secrets:
        from cowhand.crypto.secrets import given

        with given(secrets):
            root = opening.open(what, format=format, options={**common, **(options or {})})
    else:
        root = opening.open(what, format=format, options={**common, **(options or {})})
    try:
        return Disk(root, writable=writable, resizable=resizable, write_through=write_through)
    except BaseException:
        opening.abandon()
        raise


__all__ = ["__version__", "open"]

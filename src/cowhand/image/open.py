"""Opening an image by its name, a description, or a disk that the caller has open already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

from cowhand.block.disk import Disk
from cowhand.block.node.node import CONSISTENT_READ, WRITE_UNCHANGED
from cowhand.block.node.options import cache_switches
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import DEFAULT
from cowhand.core.errors import CowhandError, NotSupported, SnapshotNotFound
from cowhand.crypto.secrets import given
from cowhand.drivers import REGISTRY

if TYPE_CHECKING:
    from cowhand.block.node.records import SnapshotInfo
    from cowhand.block.opening.policy import Policy

#: What the public functions take as an image.
Image: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Disk"


def open_image(
    name: str | os.PathLike[str] | Mapping[str, Any],
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

    *name* is a path, a ``json:`` or ``PROTOCOL:`` name, or a description in QEMU's form ({"driver": "qcow2", "file": {...}}). *format* names the
    format instead of guessing it from the first bytes; a guessed raw image is opened for writing only as a block-wise copy of itself would
    be: its first sector may not become another format's header. Without *backing* the image is opened alone, and what its own layer does not store
    reads as zeroes. *resizable* False lets others rely on the length. *cache* is one of none, writethrough, writeback, directsync, unsafe.
    *force_share* takes no locks. *policy* says what the image itself may have opened. *options* are further ones of the image, by QEMU's names
    ("discard", "lazy-refcounts", "file.locking"); docs/drivers has them. *secrets* are the passphrases that ``key-secret`` options name, by id; none
    of them is part of a message or a name. Raises CowhandError; nothing stays open then.
    """
    write_through, direct, no_flush = cache_switches(cache)
    common: dict[str, Any] = {"read-only": not writable}
    if direct:
        common["cache.direct"] = True
    if no_flush:
        common["cache.no-flush"] = True
    if force_share:
        common["force-share"] = True
    opening = Opening(REGISTRY, policy or DEFAULT, backing=backing)
    if secrets:
        with given(secrets):
            root = opening.open(name, format=format, options={**common, **(options or {})})
    else:
        root = opening.open(name, format=format, options={**common, **(options or {})})
    try:
        return Disk(root, writable=writable, resizable=resizable, write_through=write_through)
    except BaseException:
        opening.abandon()
        raise


def open_source(
    what: Image,
    stack: ExitStack,
    format: str | None = None,
    *,
    snapshot: str | SnapshotInfo | None = None,
    cache: str = "writeback",
    force_share: bool = False,
    unshared: bool = False,
    policy: Policy | None = None,
) -> Disk:
    """Return *what* open for reading; *stack* closes what was opened here, and leaves the caller's own disk open.

    *unshared* keeps everybody, this process too, from writing what was opened here: no source is its own target. *snapshot* shows the image as
    it was at that internal snapshot (see :func:`cowhand.image.snapshots.choose`).
    """
    if isinstance(what, Disk):
        disk = what
    else:
        disk = open_image(what, format=format, cache=cache, force_share=force_share, policy=policy)
        stack.enter_context(disk)
        if unshared and not force_share:
            disk.share(CONSISTENT_READ | WRITE_UNCHANGED)
    if snapshot is None:
        return disk
    from cowhand.image.snapshots import open_snapshot

    try:
        return stack.enter_context(open_snapshot(disk, snapshot))
    except CowhandError as error:
        if isinstance(error, SnapshotNotFound):
            error.qemu_message = "Can't find snapshot"
        elif isinstance(error, NotSupported):
            error.qemu_message = f"Block format '{disk.format}' used by device '' does not support temporarily loading internal snapshots"
        word = snapshot if isinstance(snapshot, str) else snapshot.name or snapshot.id
        raise error.within(f"snapshot '{word}' of '{disk.filename}'", qemu="Failed to load snapshot") from None

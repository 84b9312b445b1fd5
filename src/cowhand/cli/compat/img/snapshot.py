"""``snapshot``: list, create, apply and delete snapshots inside an image."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import one_image
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command
from cowhand.cli.compat.img.records import snapshot_info, snapshot_table
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.core.errors import BitmapUnusable, CowhandError, SnapshotNotFound

if TYPE_CHECKING:
    from cowhand.block.disk import Disk

_NAME_BYTES = 255  #: of a longer name QEMU keeps the beginning


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    action = name = ""
    format = None
    image_opts = force_share = False
    short = "la:c:d:hqU" + ("f:" if program.since("10.0") else "")
    command = Command(words, short, {"image-opts": "image-opts", "force-share": "U"})
    for key, value in command:
        match key:
            case "l" | "a" | "c" | "d":
                if action:
                    raise UsageFailure("Cannot mix '-l', '-a', '-c', '-d'")
                action, name = key, value
            case "f":
                format = value
            case "U":
                force_share = True
            case "image-opts":
                image_opts = True
    image = one_image(command.positional)
    if not action and program.since("10.0"):
        action = "l"
    with open_image(
        image, format=format, image_opts=image_opts, writable=action != "l", force_share=force_share
    ) as disk:
        match action:
            case "l":
                _list(disk)
            case "c":
                _create(disk, name)
            case "a":
                _apply(disk, name)
            case "d":
                _delete(disk, name)
    return 0


def _list(disk: Disk) -> None:
    snapshots = [snapshot_info(record) for record in getattr(disk.root, "snapshots", ())]
    if snapshots:
        print("Snapshot list:")
        for line in snapshot_table(snapshots):
            print(line)


def _has_snapshots(disk: Disk) -> bool:
    return hasattr(disk.root, "snapshots")


def _create(disk: Disk, name: str) -> None:
    from cowhand.image.snapshots import create_snapshot

    number = errno.EOPNOTSUPP
    try:
        if _has_snapshots(disk):
            kept = os.fsencode(name)[:_NAME_BYTES]
            create_snapshot(disk, os.fsdecode(kept), icount=0)
            return
    except CowhandError as error:
        number = error.number
    reason = os.strerror(number) if program.since("9.2") else f"-{number} ({os.strerror(number)})"
    raise Failure(f"Could not create snapshot '{name}': {reason}")


def _apply(disk: Disk, name: str) -> None:
    from cowhand.image.snapshots import apply_snapshot, choose_as_qemu, list_snapshots, refuse_bitmaps

    reason = "Block driver does not support snapshots"
    try:
        if _has_snapshots(disk):
            refuse_bitmaps(disk)  # before the name is looked up
            apply_snapshot(disk, choose_as_qemu(list_snapshots(disk), name, disk.filename))
            return
    except SnapshotNotFound:
        reason = f"Failed to load snapshot: {os.strerror(errno.ENOENT)}"
    except BitmapUnusable as error:
        reason = error.qemu()
    except CowhandError as error:
        reason = f"Failed to load snapshot: {os.strerror(error.number)}"
        if error.qemu() != os.strerror(error.number):
            program.error(error.qemu())
    raise Failure(f"Could not apply snapshot '{name}': {reason}")


def _delete(disk: Disk, name: str) -> None:
    from cowhand.image.snapshots import delete_snapshot

    for record in getattr(disk.root, "snapshots", ()):
        if record.name == name:
            try:
                delete_snapshot(disk, record.info())
            except CowhandError as error:
                raise Failure(f"Could not delete snapshot '{name}': {error.qemu()}") from error
            return
    raise Failure(f"Could not delete snapshot '{name}': snapshot not found")

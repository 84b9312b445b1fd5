"""``bitmap``: change persistent bitmaps of an image, in the order of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cowhand.cli.compat import program
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command
from cowhand.cli.compat.program import Failure
from cowhand.cli.compat.sizes import size_argument
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.disk import Disk

_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = source_format = source_name = None
    granularity = 0
    image_opts = False
    actions: list[tuple[str, str]] = []
    long = {name: name for name in _ACTIONS if name != "merge"}
    if program.since("11"):
        long["remove-all"] = "remove-all"
    command = Command(
        words,
        "b:f:F:g:h",
        {
            **long,
            "merge": "merge=",
            "image-opts": "image-opts",
            "granularity": "g",
            "source-file": "b",
            "source-format": "F",
        },
    )
    for key, value in command:
        match key:
            case "b":
                source_name = value
            case "f":
                format = value
            case "F":
                source_format = value
            case "g":
                granularity = size_argument("granularity", value)
            case "image-opts":
                image_opts = True
            case _:
                actions.append((key, value))
    chosen = [key for key, _ in actions]
    nameless = set(chosen) == {"remove-all"}
    remove_all = "--remove-all, " if program.since("11") else ""
    for wrong, message in (
        (not actions, f"Need at least one of --add, --remove, {remove_all}--clear, --enable, --disable, or --merge"),
        (granularity and "add" not in chosen, "granularity only supported with --add"),
        (source_format is not None and source_name is None, "-F only supported with -b"),
        (source_name is not None and "merge" not in chosen, "Merge bitmap source file only supported with --merge"),
        (nameless and len(command.positional) != 1, "Expecting filename"),
        (not nameless and len(command.positional) != 2, "Expecting filename and bitmap name"),
    ):
        if wrong:
            raise Failure(message)
    filename, name = [*command.positional, ""][:2]
    with ExitStack() as stack:
        disk = stack.enter_context(
            open_image(filename, format=format, image_opts=image_opts, writable=True, backing=False)
        )
        source = disk
        if source_name is not None:
            source = stack.enter_context(open_image(source_name, format=source_format, backing=False))
        for key, value in actions:
            try:
                _do(key, value, disk, source, name, granularity)
            except CowhandError as error:
                program.error(
                    f"Operation {key} on bitmap {name} failed: {error.qemu()}", error.facts.get("advice") or ""
                )
                return 1
    return 0


def _do(key: str, value: str, disk: Disk, source: Disk, name: str, granularity: int) -> None:
    from cowhand.image import bitmaps

    match key:
        case "add":
            # QEMU hands it on in 32 bits.
            bitmaps.add_bitmap(disk, name, granularity=granularity & 0xFFFFFFFF if granularity else None)
        case "remove":
            bitmaps.remove_bitmap(disk, name)
        case "remove-all":
            for bitmap in list(bitmaps.list_bitmaps(disk)):
                bitmaps.remove_bitmap(disk, bitmap.name)
        case "clear":
            bitmaps.clear_bitmap(disk, name)
        case "enable" | "disable":
            bitmaps.enable_bitmap(disk, name, enabled=key == "enable")
        case _:
            bitmaps.find_bitmap(disk, name)  # of two that are missing QEMU names this one
            bitmaps.merge_bitmap(disk, name, bitmaps.find_bitmap(source, value))

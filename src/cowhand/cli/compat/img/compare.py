"""``compare``: tell whether two disks have the same content. Exit status 0 same, 1 different, more on errors."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowhand.cli.compat.images import cache_mode, open_image
from cowhand.cli.compat.img.command import Command, ProgressLine
from cowhand.cli.compat.img.records import whole_sectors
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.core.errors import CowhandError

_CANNOT_OPEN = 2
_CANNOT_TELL = 3
_CANNOT_READ = 4


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    formats: list[str | None] = [None, None]
    cache = "writeback"
    shown = quiet = strict = force_share = image_opts = False
    command = Command(words, "hf:F:T:pqsU", {"image-opts": "image-opts", "force-share": "U"})
    for key, value in command:
        match key:
            case "f":
                formats[0] = value
            case "F":
                formats[1] = value
            case "T":
                cache = value
            case "p":
                shown = True
            case "q":
                quiet = True
            case "s":
                strict = True
            case "U":
                force_share = True
            case "image-opts":
                image_opts = True
    if len(command.positional) != 2:
        raise UsageFailure("Expecting two image file names")
    from cowhand.copy.ops.compare import compare

    with ProgressLine(shown and not quiet, step=2.0, at_once=False) as line:
        try:
            cache = cache_mode(cache, "source cache")
        except Failure as failure:
            raise Failure(failure.message, status=_CANNOT_OPEN) from None
        disks = []
        try:
            for name, format in zip(command.positional, formats, strict=True):
                disks.append(
                    open_image(
                        name,
                        format=format,
                        image_opts=image_opts,
                        cache=cache,
                        force_share=force_share,
                        status=_CANNOT_OPEN,
                    )
                )
            line.show(0.0)
            # QEMU compares whole sectors.
            mismatch = whole_sectors(disks[0].size) != whole_sectors(disks[1].size)
            result = compare(disks[0], disks[1], strict=strict, progress=line.progress())
        except CowhandError as error:
            beyond = error.facts.get("disk_offset", 0) >= min(disk.size for disk in disks)
            if beyond and not quiet and whole_sectors(disks[0].size) != whole_sectors(disks[1].size):
                print("Warning: Image size mismatch!")
            raise _failure(error, command.positional) from error
        finally:
            for disk in disks:
                disk.close()
        if not quiet:
            if result.size_mismatch and mismatch and not strict:
                print("Warning: Image size mismatch!")
            print(result.message)
    return 0 if result.identical else 1


def _failure(error: CowhandError, names: Sequence[str]) -> Failure:
    name = names[error.facts.get("side", 0)]
    if error.facts.get("doing") == "status":
        return Failure(f"Sector allocation test failed for {name}", status=_CANNOT_TELL)
    if "disk_offset" in error.facts:
        offset = error.facts["disk_offset"]
        return Failure(
            f"Error while reading offset {offset} of {name}: {os.strerror(error.number)}", status=_CANNOT_READ
        )
    return Failure(error.qemu(), status=_CANNOT_READ)

"""``rebase``: give an image another backing file; its content stays the same, or with ``-u`` only the header changes."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowhand.cli.compat.images import cache_mode, open_image
from cowhand.cli.compat.img.command import Command, ProgressLine
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.core.errors import CowhandError, NotSupported

if TYPE_CHECKING:
    from cowhand.block.disk import Disk


class _Line:
    """The command line."""

    def __init__(self, words: Sequence[str]) -> None:
        self.format: str | None = None
        self.base: str | None = None
        self.base_format: str | None = None
        self.cache = self.source_cache = "writeback"
        self.flags: set[str] = set()
        command = Command(
            words,
            "hf:F:b:upt:T:qUc",
            {
                "image-opts": "image-opts",
                "force-share": "U",
                "backing-format": "F",
                "backing": "b",
                "backing-unsafe": "u",
                "compress": "c",
            },
        )
        for key, value in command:
            match key:
                case "f":
                    self.format = value
                case "F":
                    self.base_format = value
                case "b":
                    self.base = value
                case "t":
                    self.cache = value
                case "T":
                    self.source_cache = value
                case _:
                    self.flags.add(key)
        if len(command.positional) != 1:
            raise UsageFailure("Expecting one image file name")
        self.name = command.positional[0]
        if self.base is None and "u" not in self.flags:
            raise UsageFailure("Must specify backing file (-b) or use unsafe mode (-u)")


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    line = _Line(words)
    flags = line.flags
    with ProgressLine("p" in flags and "q" not in flags) as shown:
        cache_mode(line.cache)
        cache_mode(line.source_cache, "source cache")
        with open_image(
            line.name,
            format=line.format,
            image_opts="image-opts" in flags,
            writable=True,
            cache=line.cache,
            backing="u" not in flags,
        ) as disk:
            _rebase(line, disk, shown)
    return 0


def _rebase(line: _Line, disk: Disk, shown: ProgressLine) -> None:
    from cowhand.block.graph.block_status import skip_filters
    from cowhand.drivers import REGISTRY
    from cowhand.jobs.rebase import copy_changes

    if line.base_format is not None and REGISTRY.find(line.base_format) is None:
        raise Failure(f"Invalid format name: '{line.base_format}'")
    progress = shown.progress()
    if "u" not in line.flags:
        copy_changes(
            disk,
            line.base or None,
            line.base_format,
            compressed="c" in line.flags,
            as_bytes=True,
            cache=line.source_cache,
            force_share="U" in line.flags,
            progress=progress,
        )
    shown_name = "(null)" if line.base is None else line.base
    failed = f"Could not change the backing file to '{shown_name}': "
    change = getattr(skip_filters(disk.root), "change_backing", None)
    if line.base and line.base_format is None:
        progress.finish()
        raise Failure(failed + "backing format must be specified")
    try:
        if change is None:
            raise NotSupported("Operation not supported")
        change(line.base or None, line.base_format)
    except CowhandError as error:
        progress.finish()
        reason = "No space left in the file header" if error.number == errno.ENOSPC else os.strerror(error.number)
        raise Failure(failed + reason) from error
    progress.finish()

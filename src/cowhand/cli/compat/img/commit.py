"""``commit``: write an overlay's changes into an image below it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowhand.block.opening import combine, location
from cowhand.block.options import nest
from cowhand.block.status import skip_filters
from cowhand.cli.compat.images import cache_mode, describe, open_image, warn_of_guess
from cowhand.cli.compat.img.command import Command, ProgressLine
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.cli.compat.sizes import size_argument
from cowhand.core.errors import IOFailed

if TYPE_CHECKING:
    from cowhand.block.disk import Disk


def _find(disk: Disk, base: str) -> None:
    """Refuse a *base* that is no layer under *disk*: a relative name is relative to the image above the layer, as in headers."""
    node = skip_filters(disk.root)
    while (below := node.backing) is not None:
        layer = skip_filters(below.node)
        recorded = getattr(getattr(node, "header", None), "backing_name", None)
        full = os.path.realpath(combine(location(node), base))
        if base == recorded or full == os.path.realpath(layer.filename):
            return
        node = layer
    raise Failure(f"Did not find '{base}' in the backing chain of '{disk.filename}'")


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = base = None
    cache = "writeback"
    rate = 0
    quiet = drop = shown = image_opts = False
    command = Command(words, "f:ht:b:dpqr:", {"image-opts": "image-opts"})
    for key, value in command:
        match key:
            case "f":
                format = value
            case "t":
                cache = value
            case "b":
                base = value
            case "d":
                drop = True
            case "p":
                shown = True
            case "q":
                quiet = True
            case "r":
                rate = size_argument("rate limit", value)
            case "image-opts":
                image_opts = True
    if len(command.positional) != 1:
        raise UsageFailure("Expecting one image file name")
    name = command.positional[0]
    cache = cache_mode(cache)
    from cowhand.jobs.commit import commit

    # Opened once for its words and warnings; the commit itself opens the chain from the base up.
    with open_image(name, format=format, image_opts=image_opts, cache=cache) as disk:
        warn_of_guess(disk)
        if base is not None:
            _find(disk, base)
    what = describe(name, image_opts)
    top = what if isinstance(what, str) else "json:" + json.dumps(nest(what))
    with ProgressLine(shown and not quiet) as line:
        try:
            commit(
                top,
                base,
                format=format,
                drop=drop,
                rate_limit=rate,
                cache=cache,
                progress=line.progress(),
            )
        except IOFailed as error:
            raise Failure(f"Block job failed: {os.strerror(error.errno or errno.EIO)}") from error
    if not quiet:
        print("Image committed.")
    return 0

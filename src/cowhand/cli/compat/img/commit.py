"""``commit``: write an overlay's changes into an image below it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cowhand.block.options import nest
from cowhand.cli.compat.images import cache_mode, describe, open_image, warn_of_guess
from cowhand.cli.compat.img.command import Command, ProgressLine
from cowhand.cli.compat.program import UsageFailure
from cowhand.cli.compat.sizes import size_argument


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
    from cowhand.core.progress import Progress
    from cowhand.jobs.commit import commit

    # Opened once for its words and warnings; the commit itself opens the chain from the base up.
    with open_image(name, format=format, image_opts=image_opts, cache=cache) as disk:
        warn_of_guess(disk)
    what = describe(name, image_opts)
    top = what if isinstance(what, str) else "json:" + json.dumps(nest(what))
    with ProgressLine(shown and not quiet) as line:
        commit(
            top,
            base,
            format=format,
            drop=drop,
            rate_limit=rate,
            cache=cache,
            progress=Progress(listener=line.hear),
        )
    if not quiet:
        print("Image committed.")
    return 0

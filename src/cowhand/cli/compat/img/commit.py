"""``commit``: write an overlay's changes into an image below it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cowhand.cli.compat.images import cache_mode, described, refuse_read_only, warn_of_guess
from cowhand.cli.compat.img.command import Command, ProgressLine, failing_as
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.cli.compat.sizes import size_argument
from cowhand.core.errors import CowhandError, IOFailed

if TYPE_CHECKING:
    from cowhand.jobs.commit import Layers


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
    if image_opts and format is not None:
        raise Failure("--image-opts and --format are mutually exclusive")
    from cowhand.jobs.commit import copy_down, empty, open_layers

    with ExitStack() as stack:
        what, layers = _open(name, image_opts, format, cache)
        stack.callback(lambda: layers.close())
        line = stack.enter_context(ProgressLine(shown and not quiet))
        try:
            above = 1 if base is None else layers.find(base, as_in_header=True)
        except CowhandError as error:
            raise Failure(f"Did not find '{base}' in the backing chain of '{name}'") from error
        if above != layers.above:
            layers.close()
            layers = open_layers(what, above, format=format, cache=cache)
        try:
            copy_down(layers, rate_limit=rate, progress=line.progress())
        except IOFailed as error:
            raise Failure(f"Block job failed: {os.strerror(error.number)}") from error
        if base is None and not drop:
            try:
                empty(layers.top)
            except CowhandError as error:
                raise Failure(f"Failed to empty {layers.top.filename}: {os.strerror(error.number)}") from error
    if not quiet:
        print("Image committed.")
    return 0


def _open(name: str, image_opts: bool, format: str | None, cache: str) -> tuple[str | Mapping[str, Any], Layers]:
    """Return what *name* describes, and its chain down to the backing file."""
    from cowhand.jobs.commit import open_layers

    prefix = f"Could not open '{name}': "
    with failing_as(prefix):
        what = described(name, image_opts, has_format=format is not None)
        refuse_read_only(what, writable=True)
    try:
        layers = open_layers(what, format=format, cache=cache)
    except CowhandError as error:
        # That the base cannot be written, QEMU finds out when the chain is open.
        raise Failure(("" if error.facts.get("for_writing") else prefix) + error.qemu()) from error
    warn_of_guess(layers.top)
    return what, layers

"""``rebase``: record another backing file. Only the unsafe mode (``-u``), which trusts the user that both hold the same."""

from __future__ import annotations

from collections.abc import Sequence

from cowhand.block.options import CACHE_MODES
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command, failing_as
from cowhand.cli.compat.program import Failure, UsageFailure


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = base = base_format = None
    unsafe = image_opts = False
    command = Command(
        words,
        "hf:F:b:upt:T:qU",
        {"image-opts": "image-opts", "force-share": "U", "backing-format": "F", "backing": "b"},
    )
    for key, value in command:
        match key:
            case "f":
                format = value
            case "F":
                base_format = value
            case "b":
                base = value
            case "u":
                unsafe = True
            case "image-opts":
                image_opts = True
            case "t" | "T":
                if value not in CACHE_MODES:
                    raise Failure(f"Invalid cache option: {value}")
            case _:
                pass  # progress and quiet change nothing of a header's rewriting
    if len(command.positional) != 1:
        raise UsageFailure("Expecting one image file name")
    if base is None and not unsafe:
        raise UsageFailure("Use backing file (-b) option")
    if not unsafe:
        raise Failure(
            "Rebasing that compares and copies is not supported yet; with -u only the name in the header changes"
        )
    name = command.positional[0]
    with open_image(name, format=format, image_opts=image_opts, writable=True, backing=False) as disk:
        change = getattr(disk.root, "change_backing", None)
        if change is None:
            raise Failure(f"Could not change the backing file to '{base or ''}': Operation not supported")
        if base and base_format is None:
            raise Failure(f"Could not change the backing file to '{base}': backing format must be specified")
        with failing_as(f"Could not change the backing file to '{base or ''}': "):
            change(base or None, base_format)
    return 0

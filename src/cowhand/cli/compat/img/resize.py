"""``resize``: make a disk longer or shorter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cowhand.cli.compat import program
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command
from cowhand.cli.compat.img.records import whole_sectors
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.cli.compat.sizes import MAX_SIZE, size_option

_SHORT = "f:hq"
_LONG = {"image-opts": "image-opts", "preallocation": "preallocation=", "shrink": "shrink"}
PREALLOCATION = ("off", "metadata", "falloc", "full")


def preallocation_mode(text: str) -> str:
    """Return the preallocation mode *text*."""
    if text not in PREALLOCATION:
        raise Failure(f"Invalid preallocation mode '{text}'")
    return text


def _without_size(words: Sequence[str]) -> tuple[Sequence[str], str | None]:
    """Return the words that are scanned for options, and the size if it is not one of them: it may begin with a dash.

    It is the last word; since 10.0 a number with a dash right after the name, and otherwise an argument like any other.
    """
    if not program.since("10.0"):
        if len(words) < 3:
            raise UsageFailure("Not enough arguments")
        return words[:-1], words[-1]
    place = Command(words, _SHORT, _LONG).first_argument()
    if place is not None and re.match(r"-[0-9]", "".join(words[place + 1 : place + 2])):
        return [*words[: place + 1], *words[place + 2 :]], words[place + 1]
    return words, None


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    words, size = _without_size(words)
    format = None
    quiet = image_opts = shrink = False
    preallocation = "off"
    command = Command(words, _SHORT, _LONG)
    for key, value in command:
        match key:
            case "f":
                format = value
            case "q":
                quiet = True
            case "image-opts":
                image_opts = True
            case "preallocation":
                preallocation = preallocation_mode(value)
            case "shrink":
                shrink = True
    names = command.positional
    if size is None and len(names) > 1:
        size = names.pop(1)
    if len(names) > 1 and program.since("10.0"):
        plain = "--" not in words[1:]
        raise UsageFailure("Extra argument(s) in command line" if plain else "Expecting image file name and size")
    if len(names) != 1 or size is None:
        raise UsageFailure("Expecting image file name and size")
    sign = size[:1] if size[:1] in ("+", "-") else ""
    amount = size_option("size", size[len(sign) :])
    with open_image(command.positional[0], format=format, image_opts=image_opts, writable=True) as disk:
        old = whole_sectors(disk.size)
        new = old + amount if sign == "+" else old - amount if sign == "-" else amount
        if not 0 < new <= MAX_SIZE:
            raise Failure("New image size must be positive")
        if new <= old and preallocation != "off":
            raise Failure("Preallocation can only be used for growing images")
        if new < old and not shrink:
            program.error("Use the --shrink option to perform a shrink operation.")
            program.warning(
                "Shrinking an image will delete all data beyond the shrunken image's end. Before performing "
                "such an operation, make sure there is no important data there."
            )
            raise Failure
        disk.resize(new, preallocation=preallocation, shrink=shrink)
    if not quiet:
        print("Image resized.")
    return 0

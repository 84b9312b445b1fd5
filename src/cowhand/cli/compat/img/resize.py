"""``resize``: make a disk longer or shorter."""

from __future__ import annotations

from collections.abc import Sequence

from cowhand.cli.compat import program
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command
from cowhand.cli.compat.img.records import whole_sectors
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.cli.compat.sizes import MAX_SIZE, size_option

PREALLOCATION = ("off", "metadata", "falloc", "full")


def preallocation_mode(text: str) -> str:
    """Return the preallocation mode *text*."""
    if text not in PREALLOCATION:
        raise Failure(f"Invalid preallocation mode '{text}'")
    return text


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if program.since("10.1") and words[-1] in ("-h", "--help"):
        words = [*words, ""]
    if len(words) < 3:
        raise UsageFailure("Not enough arguments")
    size = words[-1]  # taken before the options, since it may begin with a dash
    format = None
    quiet = image_opts = shrink = False
    preallocation = "off"
    command = Command(
        words[:-1], "f:hq", {"image-opts": "image-opts", "preallocation": "preallocation=", "shrink": "shrink"}
    )
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
    if len(command.positional) != 1:
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

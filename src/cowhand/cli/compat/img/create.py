"""``create``: make a new image."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from cowhand.cli.compat.img.command import Command, failing_as
from cowhand.cli.compat.optionstrings import CreateOptions, known_options, print_help
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.cli.compat.sizes import size_argument
from cowhand.core.errors import CowhandError


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = "raw"
    backing = backing_format = None
    quiet = unsafe = False
    chosen = CreateOptions()
    command = Command(words, "F:b:f:ho:qu")
    for key, value in command:
        match key:
            case "F":
                backing_format = value
            case "b":
                backing = value
            case "f":
                format = value
            case "o":
                chosen.add(value)
            case "q":
                quiet = True
            case "u":
                unsafe = True
    positional = command.positional
    filename = positional[0] if positional else None
    if chosen.wants_help:
        print_help(format, filename)
        return 0
    if filename is None:
        raise UsageFailure("Expecting image file name")
    size = size_argument("image size", positional[1]) if len(positional) > 1 else None
    if len(positional) > 2:
        raise UsageFailure(f"Unexpected argument: {positional[2]}")
    from cowhand.block.opening.policy import AS_QEMU
    from cowhand.drivers import REGISTRY
    from cowhand.image.create import format_of, prepare

    with failing_as(f"{filename}: "):
        format_of(format, REGISTRY)
        creation = prepare(
            filename,
            format,
            size,
            chosen.values(known_options(format, filename)),
            backing=backing,
            backing_format=backing_format,
            open_backing=not unsafe,
            policy=AS_QEMU,
        )
        if not quiet:
            print(creation.line(), flush=True)
        try:
            creation.run(overwrite=True, like_qemu=True)
        except CowhandError as error:
            if format != "raw":
                _remove_stub(filename)
            if error.errno != errno.EFBIG:
                raise
            advice = " (try using a larger cluster size)" if "cluster_size" in creation.options else ""
            raise Failure(f"The image size is too large for file format '{format}'{advice}") from error
    return 0


def _remove_stub(filename: str) -> None:
    """Remove the empty file that was to become an image and did not. QEMU removes what has content, too; here that is left as it was."""
    from cowhand.image.create import local_path

    path = local_path(filename)
    try:
        if path is not None:
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode) and not found.st_size:
                os.unlink(path)
    except OSError:
        pass  # the error that led here is the one to tell

"""``measure``: tell how large a new image becomes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import OptionError, output_format
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img import show_help
from cowhand.cli.compat.img.command import Command
from cowhand.cli.compat.img.snapshotnames import Wanted
from cowhand.cli.compat.optionstrings import CreateOptions, known_options
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.cli.compat.sizes import size_argument

if TYPE_CHECKING:
    from cowhand.copy.ops.measure import Measurement


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    try:
        return _run(words)
    except UsageFailure as failure:
        if not isinstance(failure.__cause__, OptionError):
            raise
        # This command leaves wrong options to the C library, and calls them a request for help.
        program.plain(failure.__cause__.in_libc_words(words[0]))
        return show_help()


def _run(words: Sequence[str]) -> int:
    format = wanted = size = None
    target_format = "raw"
    json = image_opts = force_share = False
    chosen = CreateOptions()
    command = Command(
        words,
        "hf:l:o:O:U",
        {"output": "output=", "size": "size=", "image-opts": "image-opts", "force-share": "U"},
    )
    for key, value in command:
        match key:
            case "f":
                format = value
            case "l":
                wanted = Wanted(value)
            case "o":
                chosen.add(value)
            case "O":
                target_format = value
            case "U":
                force_share = True
            case "image-opts":
                image_opts = True
            case "output":
                json = output_format(value)
            case "size":
                size = size_argument("image size", value)
    positional = command.positional
    if len(positional) > 1:
        raise Failure("At most one filename argument is allowed.")
    if not positional and (image_opts or format is not None or wanted is not None):
        raise Failure("--image-opts, -f, and -l require a filename argument.")
    if not positional and size is None:
        raise Failure("Either --size N or one filename must be specified.")
    if positional and size is not None:
        raise Failure("--size N cannot be used together with a filename.")
    with ExitStack() as stack:
        disk = snapshot = None
        if positional:
            disk = stack.enter_context(
                open_image(positional[0], format=format, image_opts=image_opts, force_share=force_share)
            )
            snapshot = wanted.find(disk) if wanted is not None else None
        _check_format(target_format)
        try:
            options = chosen.values(known_options(target_format, "")) if chosen else {}
        except Failure as failure:
            program.error(failure.message or "", failure.hint)
            raise Failure(f"Invalid options for file format '{target_format}'") from None
        if target_format == "luks":
            from cowhand.crypto import secrets

            secrets.candidates(options.get("key-secret"), "key-secret")  # asked for, though not needed
        from cowhand.copy.ops.measure import measure

        _show(measure(disk, target_format, size=size, options=options, snapshot=snapshot), json=json)
    return 0


def _check_format(name: str) -> None:
    from cowhand.drivers import REGISTRY

    entry = REGISTRY.find(name)
    if entry is None:
        raise Failure(f"Unknown file format '{name}'")
    if not entry.creatable:
        raise Failure(f"Format driver '{name}' does not support image creation")
    if entry.kind != "format":
        raise Failure(f"Block driver '{name}' does not support size measurement")


def _show(result: Measurement, *, json: bool) -> None:
    if json:
        from cowhand.cli.compat.jsontext import render

        document = {"required": result.required, "fully-allocated": result.fully_allocated}
        print(render(document if result.bitmaps is None else {**document, "bitmaps": result.bitmaps}))
        return
    print(f"required size: {result.required}")
    print(f"fully allocated size: {result.fully_allocated}")
    if result.bitmaps is not None:
        print(f"bitmaps size: {result.bitmaps}")

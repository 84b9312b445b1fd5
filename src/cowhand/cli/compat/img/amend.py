"""``amend``: change what an image is, in place: its version and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cowhand.cli.compat.images import cache_mode, open_image
from cowhand.cli.compat.img.command import Command, ProgressLine
from cowhand.cli.compat.optionstrings import CreateOptions, help_lines
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.node.create_options import CreateOption


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = None
    quiet = shown = image_opts = force = False
    cache = "writeback"
    chosen = CreateOptions()
    command = Command(words, "ho:f:t:pq", {"image-opts": "image-opts", "force": "force"})
    for key, value in command:
        match key:
            case "o":
                chosen.add(value)
            case "f":
                format = value
            case "t":
                cache = value
            case "p":
                shown = True
            case "q":
                quiet = True
            case "image-opts":
                image_opts = True
            case _:
                force = True
    if not chosen:
        raise UsageFailure("Must specify options (-o)")
    name = command.positional[-1] if len(command.positional) == 1 else None
    with ExitStack() as stack:
        line = stack.enter_context(ProgressLine(shown and not quiet, at_once=False))
        if format is not None and chosen.wants_help:
            return _help(format)
        if name is None:
            raise Failure("Expecting one image file name")
        cache = cache_mode(cache)
        disk = stack.enter_context(open_image(name, format=format, image_opts=image_opts, writable=True, cache=cache))
        node: Any = disk.root  # of a driver that can be amended
        options = _amend_options(node.driver)
        if chosen.wants_help:
            return _help(node.driver)
        values = _values(chosen, options, node.driver)
        line.show(0.0)
        try:
            node.amend(values, line.show_part, force=force)
        except CowhandError as error:
            raise Failure(error.qemu(), hint=error.facts.get("advice", "")) from error
        line.show_part(1, 1)
    return 0


def _amend_options(driver: str) -> Mapping[str, CreateOption]:
    from cowhand.drivers import REGISTRY

    entry = REGISTRY.find(driver)
    if entry is None:
        raise Failure(f"Unknown file format '{driver}'")
    options = getattr(entry.load(), "amend_options", None)
    if options is None:
        raise Failure(f"Format driver '{driver}' does not support option amendment")
    return {option.name: option for option in options()}


def _help(driver: str) -> int:
    known = _amend_options(driver)
    print(f"Amend options for '{driver}':")
    for line in help_lines(known.values()):
        print(line)
    return 0


def _values(chosen: CreateOptions, known: Mapping[str, CreateOption], driver: str) -> dict[str, Any]:
    try:
        return chosen.values(known)
    except Failure as failure:
        from cowhand.cli.compat.optionstrings import known_options

        try:
            chosen.values(known_options(driver))
        except Failure:
            pass
        else:
            unknown = failure.message or ""
            raise Failure(unknown, hint="This option is only supported for image creation") from None
        raise

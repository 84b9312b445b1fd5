"""``dd``: copy a range of blocks into a new image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cowhand.cli.compat import program
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command, failing_as
from cowhand.cli.compat.program import Failure
from cowhand.cli.compat.sizes import MAX_SIZE, size_argument
from cowhand.core.errors import CowhandError

_MAX_BLOCK = (1 << 31) - 1
_OPERANDS = ("bs", "count", "if", "of", "skip")


class _Operands:
    """bs=, count=, skip=, if= and of=."""

    def __init__(self, words: Sequence[str]) -> None:
        self.block_size = 512
        self.count: int | None = None
        self.skip = 0
        self.names: dict[str, str] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in _OPERANDS:
                raise Failure(f"unrecognized operand {name}")
            if name == "bs":
                self.block_size = size_argument("bs", value, 1, _MAX_BLOCK)
            elif name == "count":
                self.count = size_argument("count", value, 0, MAX_SIZE)
            elif name == "skip":
                self.skip = size_argument("skip", value, 0, MAX_SIZE)
            else:
                self.names[name] = value
        if len(self.names) != 2:
            raise Failure("Must specify both input and output files")

    def bound(self) -> None:
        """Let what lies past the end of every disk lie just there: products of these numbers are no sizes."""
        last = MAX_SIZE // self.block_size
        self.skip = min(self.skip, last)
        if self.count is not None:
            self.count = min(self.count, last)


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = None
    target_format = "raw"
    image_opts = force_share = False
    command = Command(words, "hf:O:U", {"image-opts": "image-opts", "force-share": "U"})
    for key, value in command:
        match key:
            case "O":
                target_format = value
            case "f":
                format = value
            case "U":
                force_share = True
            case "image-opts":
                image_opts = True
    operands = _Operands(command.positional)
    operands.bound()
    target = operands.names["of"]
    from cowhand.copy.ops.dd import dd
    from cowhand.drivers import REGISTRY
    from cowhand.image.create import protocol_of

    source = open_image(
        operands.names["if"], format=format, image_opts=image_opts, force_share=force_share, unshared=True
    )
    with source:
        entry = REGISTRY.find(target_format)
        if entry is None:
            raise Failure("Unknown file format")
        if not entry.creatable:
            raise Failure(f"Format driver '{target_format}' does not support image creation")
        warnings: list[str] = []  # of which nobody hears when there is no new image
        protocol_of(target, REGISTRY)
        with _failing(f"{target}: error while creating output image: "):
            dd(
                source,
                target,
                target_format,
                block_size=operands.block_size,
                count=operands.count,
                skip=operands.skip,
                overwrite=True,
                like_qemu=True,
                warn=warnings.append,
            )
    if warnings:
        program.error(f"{operands.names['if']}: cannot skip to specified offset")
    return 0


@contextmanager
def _failing(prefix: str) -> Iterator[None]:
    """Turn errors inside into a Failure that tells what was being done."""
    try:
        with failing_as(prefix):
            yield
    except Failure as failure:
        error = failure.__cause__
        doing = error.facts.get("doing") if isinstance(error, CowhandError) else None
        if doing is None or not isinstance(error, CowhandError):
            raise
        side = "reading from input" if doing == "reading" else "writing to output"
        raise Failure(f"error while {side} image file: {os.strerror(error.number)}") from error

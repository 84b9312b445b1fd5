"""``bench``: send many equal requests, several at a time, and tell how long it took."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.block.node.options import CACHE_MODES
from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import one_image
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command
from cowhand.cli.compat.program import Failure
from cowhand.cli.compat.sizes import number_argument, size_argument
from cowhand.core.errors import CowhandError, OutOfRange

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.node import Request

_INT_MAX = (1 << 31) - 1
_UINT_MAX = (1 << 32) - 1
_DIRECT = ("none", "off", "directsync")
#: Requests have buffers of their own up to so many bytes in all; larger ones share one.
_MAX_BUFFERS = 64 << 20


class _Line:
    """The command line."""

    def __init__(self, words: Sequence[str]) -> None:
        self.format: str | None = None
        self.count, self.depth = 75000, 64
        self.offset, self.size, self.step = 0, 4096, 0
        self.pattern = self.interval = 0
        self.cache, self.aio = "writeback", "threads"
        self.flags: set[str] = set()
        command = Command(
            words,
            "hc:d:f:ni:o:qs:S:t:wU",
            {
                "flush-interval": "flush-interval=",
                "pattern": "pattern=",
                "no-drain": "no-drain",
                "image-opts": "image-opts",
                "force-share": "U",
                "count": "c",
                "depth": "d",
                "offset": "o",
                "buffer-size": "s",
                "step-size": "S",
                "write": "w",
                "cache": "t",
                "aio": "i",
                "native": "n",
                "format": "f",
                "quiet": "q",
            },
        )
        for key, value in command:
            self._take(key, value)
        self.name = one_image(command.positional)
        self.step = self.step or self.size
        if self.interval and "w" not in self.flags:
            raise Failure("--flush-interval is only available in write tests")
        if self.interval and self.interval < self.depth:
            raise Failure("Flush interval can't be smaller than depth")

    def _take(self, key: str, value: str) -> None:
        match key:
            case "c":
                later = program.since("10.0")
                self.count = _number("request count", value, _INT_MAX if later else _UINT_MAX, 1 if later else 0)
            case "d":
                self.depth = _number("queue depth", value, _INT_MAX, lowest=1)
            case "f":
                self.format = value
            case "n":
                self.aio = "native"
            case "i":
                if value not in ("threads", "native", "io_uring"):
                    raise Failure(f"Invalid aio option: {value}")
                self.aio = value
            case "o":
                self.offset = size_argument("offset", value)
            case "s":
                self.size = size_argument("buffer size", value, 1 if program.since("10.0") else 0, _INT_MAX)
            case "S":
                self.step = size_argument("step size" if program.since("10.0") else "step_size", value, 0, _INT_MAX)
            case "t":
                if value not in CACHE_MODES:
                    raise Failure("Invalid cache mode")
                self.cache = value
            case "pattern":
                self.pattern = _number("pattern byte", value, 0xFF)
            case "flush-interval":
                self.interval = _number("flush interval", value, _INT_MAX)
            case _:
                self.flags.add(key)


def _number(what: str, text: str, highest: int, lowest: int = 0) -> int:
    if program.since("10.0"):
        return number_argument(what, text, lowest, highest)
    try:
        value = int(text.lstrip(), 0)
    except ValueError:
        value = -1
    if not lowest <= value <= highest:
        raise Failure(f"Invalid {what} specified")
    return value


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    line = _Line(words)
    if line.aio == "native" and line.cache not in _DIRECT:
        reason = "aio=native was specified, but it requires cache.direct=on, which was not specified."
        raise Failure(f"Could not open '{line.name}': {reason}")
    with open_image(
        line.name,
        format=line.format,
        image_opts="image-opts" in line.flags,
        writable="w" in line.flags,
        cache=line.cache,
        force_share="U" in line.flags,
    ) as disk:
        print(
            f"Sending {line.count} {'write' if 'w' in line.flags else 'read'} requests, {line.size} bytes each, "
            f"{line.depth} in parallel (starting at offset {line.offset}, step size {line.step})"
        )
        if line.interval:
            print(f"Sending flush every {line.interval} requests")
        print(f"Run completed in {_measure(disk, line):3.3f} seconds.")
    return 0


def _measure(disk: Disk, line: _Line) -> float:
    from cowhand.core import clock

    begin = clock.monotonic()
    for batch in _batches(disk, line):
        try:
            disk.submit(batch)
        except CowhandError as error:
            number = errno.EIO if isinstance(error, OutOfRange) else error.number
            raise Failure(f"Failed request: {os.strerror(number)}") from error
    return clock.monotonic() - begin


def _batches(disk: Disk, line: _Line) -> Iterator[list[Request]]:
    """Yield what is sent at once. A flush ends a batch, so that it waits for what came before; without draining it goes with others."""
    from cowhand.block.node.node import FLUSH, READ, WRITE_REQUEST

    kind = WRITE_REQUEST if "w" in line.flags else READ
    views = _buffers(line)
    offset, sent = line.offset, 0
    drain = "no-drain" not in line.flags
    batch: list[Request] = []
    while sent < line.count:
        batch.append((kind, offset, views[len(batch) % len(views)]))
        offset += line.step
        # From the end it goes on at the beginning, since 10.2 so that every request lies inside.
        turn = max(disk.size - line.size, 1) if program.since("10.2") else max(disk.size, 1)
        if offset >= turn:
            offset %= turn
        sent += 1
        flush = line.interval and sent % line.interval == 0
        if len(batch) >= line.depth or (flush and drain):
            yield batch
            batch = []
        if flush:
            batch.append((FLUSH, 0, 0))
            if drain:
                yield batch
                batch = []
    if batch:
        yield batch


def _buffers(line: _Line) -> list[memoryview]:
    depth = min(line.depth, line.count) + 1
    count = depth if depth * line.size <= _MAX_BUFFERS else 1
    whole = memoryview(bytearray(bytes([line.pattern])) * (line.size * count))
    return [whole[index * line.size : (index + 1) * line.size] for index in range(count)]

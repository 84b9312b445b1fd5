"""``map``: tell which parts of a disk are stored where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.block.graph.block_status import layered, skip_filters
from cowhand.block.opening.filenames import bottom
from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import early_output_format, one_image, output_format
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command
from cowhand.cli.compat.img.records import SECTOR, whole_sectors
from cowhand.cli.compat.program import Failure
from cowhand.cli.compat.sizes import size_argument
from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, OFFSET, ZERO, Extent, ExtentBatch, merged

if TYPE_CHECKING:
    from cowhand.block.disk import Disk

_SHOWN = DATA | ZERO | ALLOCATED | OFFSET


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = None
    json = image_opts = force_share = False
    start, length = 0, None
    command = Command(
        words,
        "hf:s:l:U",
        {
            "format": "f",
            "output": "output=",
            "image-opts": "image-opts",
            "force-share": "U",
            "start-offset": "s",
            "max-length": "l",
        },
    )
    output = None
    for key, value in command:
        match key:
            case "f":
                format = value
            case "U":
                force_share = True
            case "output":
                output = early_output_format(value)
            case "image-opts":
                image_opts = True
            case "s":
                start = size_argument("start offset", value)
            case "l":
                length = size_argument("max length", value)
    name = one_image(command.positional)
    if output is not None:
        json = output_format(output)
    with open_image(name, format=format, image_opts=image_opts, force_share=force_share) as disk:
        if json:
            _print_json(disk, start, length)
        else:
            _print_table(disk, start, length)
    return 0


def _rows(disk: Disk, start: int, length: int | None) -> Iterator[Extent]:
    return merged(_batches(disk, start, length), _SHOWN | (COMPRESSED if program.since("8.2") else 0))


def _batches(disk: Disk, start: int, length: int | None) -> Iterator[ExtentBatch]:
    end = disk.size if length is None else min(disk.size, start + length)
    last: Extent | None = None
    if start < end:
        for batch in _asked(disk, start, end):
            yield batch
            last = list(batch)[-1]
    # QEMU rounds a disk up to whole sectors. What it adds reads as zeroes; with direct I/O it belongs to the block that it is in.
    whole = whole_sectors(disk.size)
    rest = whole if length is None else min(whole, start + length)
    begin = max(disk.size, start)
    if begin < rest:
        tail = ExtentBatch()
        joined = last is not None and last.flags & OFFSET and disk.root.limits.request_alignment >= SECTOR
        flags, host = ZERO | ALLOCATED | OFFSET, begin
        if bottom(disk.root).driver == "nbd":
            flags &= ~OFFSET  # an export ends with its last byte, a file is padded
        if last is not None and joined:
            flags, host = last.flags, last.host + last.length
        tail.add(begin, rest - begin, flags, host, last.node if last is not None else None)
        yield tail


def _asked(disk: Disk, start: int, end: int) -> Iterator[ExtentBatch]:
    node = skip_filters(disk.root)  # what they would say to it does not matter here
    while start < end:
        batch = layered(node, start, end - start)
        yield batch
        start = batch.end


def _print_table(disk: Disk, start: int, length: int | None) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for row in _rows(disk, start, length):
        if row.flags & (DATA | ZERO | ALLOCATED) != DATA | ALLOCATED:
            continue
        if not row.flags & OFFSET:
            raise Failure("File contains external, encrypted or compressed clusters.")
        # C's %#x writes no prefix before a zero.
        fields = (f"{number:#x}" if number else "0" for number in (row.start, row.length, row.host))
        print("".join(f"{field:<16}" for field in fields) + row.node.filename)


def _print_json(disk: Disk, start: int, length: int | None) -> None:
    separator = "["
    for row in _rows(disk, start, length):
        print(separator + _entry(row), end="")
        separator = ",\n"
    if separator == "[":
        print("[" + _entry(Extent(start, 0, 0, 0, None, 0)), end="")
    print("]")


def _entry(row: Extent) -> str:
    # Bytes that no layer decides on have to be read as data, but nothing is told of them.
    known = row.flags if row.flags & (ALLOCATED | ZERO) else 0
    words = [
        f"{name}: {'true' if known & flag else 'false'}"
        for name, flag in (('"present"', ALLOCATED), ('"zero"', ZERO), ('"data"', DATA))
    ]
    if program.since("8.2"):
        words.append(f'"compressed": {"true" if known & COMPRESSED else "false"}')
    offset = f', "offset": {row.host}' if known & OFFSET else ""
    return f'{{ "start": {row.start}, "length": {row.length}, "depth": {row.depth}, {", ".join(words)}{offset}}}'

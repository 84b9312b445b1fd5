"""``convert``: copy disks into a new or an existing image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cowhand.cli.compat import program
from cowhand.cli.compat.images import cache_mode, open_image
from cowhand.cli.compat.img.command import Command, ProgressLine
from cowhand.cli.compat.img.snapshotnames import Wanted
from cowhand.cli.compat.optionstrings import CreateOptions, known_options, print_help
from cowhand.cli.compat.program import Failure
from cowhand.cli.compat.sizes import number_argument, size_argument
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.records import SnapshotInfo

SECTOR = 512
_DEFAULT_SPARSE = 4096
_NO_BACKING = "\nCould not open backing image."
_MAX_SPARSE = 16 << 20
_WORKERS = "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16"
_SPARSE = (
    "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. "
    "Select 0 to disable sparse detection (fully allocates output)."
)
_CONCATENATED = "Having a backing file for the target makes no sense when concatenating multiple input images"
_FLAGS = {
    "C": "copy_range",
    "c": "compressed",
    "n": "no_create",
    "p": "progress",
    "q": "quiet",
    "U": "force_share",
    "W": "out_of_order",
}
_LONG_FLAGS = {
    "image-opts": "image_opts",
    "target-image-opts": "target_image_opts",
    "target-is-zero": "target_is_zero",
    "salvage": "salvage",
    "bitmaps": "bitmaps",
    "skip-broken-bitmaps": "skip_broken_bitmaps",
}


class _Line:
    """The command line, read and checked as far as it can be before an image is opened."""

    def __init__(self, words: Sequence[str]) -> None:
        self.flags: set[str] = set()
        self.format: str | None = None
        self.target_format: str | None = None
        self.backing: str | None = None
        self.backing_format: str | None = None
        self.cache, self.source_cache = "unsafe", "writeback"
        self.snapshot: Wanted | None = None
        self.sparse: int | None = None
        self.workers: int | None = None
        self.rate = 0
        self.options = CreateOptions()
        command = Command(
            words,
            "hf:O:B:CcF:o:l:S:pt:T:qnm:WUr:",
            {**{name: name for name in _LONG_FLAGS}, "force-share": "U"},
        )
        for key, value in command:
            self._take(key, value)
        self.names = command.positional

    def _take(self, key: str, value: str) -> None:
        if key in _FLAGS or key in _LONG_FLAGS:
            self.flags.add(_FLAGS.get(key) or _LONG_FLAGS[key])
            return
        match key:
            case "f":
                self.format = value
            case "O":
                self.target_format = value
            case "B":
                self.backing = value
            case "F":
                self.backing_format = value
            case "o":
                self.options.add(value)
            case "l":
                self.snapshot = Wanted(value)
            case "S":
                self.sparse = size_argument("buffer size for sparse output", value)
                if self.sparse % SECTOR or self.sparse > _MAX_SPARSE:
                    raise Failure(_SPARSE)
            case "m" if program.since("10.0"):
                self.workers = number_argument("number of coroutines", value, 1, 16)
            case "m":
                if not value.isdecimal() or not 1 <= int(value) <= 16:
                    raise Failure(_WORKERS)
                self.workers = int(value)
            case "r":
                self.rate = size_argument("rate limit", value)
            case "t":
                self.cache = value
            case "T":
                self.source_cache = value

    def check(self) -> None:
        """Refuse what contradicts itself, the first thing first."""
        flags = self.flags
        for wrong, message in (
            (
                "skip_broken_bitmaps" in flags and "bitmaps" not in flags,
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ),
            ({"compressed", "copy_range"} <= flags, "Cannot enable copy offloading when -c is used"),
            ("copy_range" in flags and self.sparse is not None, "Cannot enable copy offloading when -S is used"),
            ({"copy_range", "salvage"} <= flags, "Cannot use copy offloading in salvaging mode"),
            ("target_image_opts" in flags and "no_create" not in flags, "--target-image-opts requires use of -n flag"),
            ("no_create" in flags and self.options, "-o has no effect when skipping image creation"),
            ("target_is_zero" in flags and "no_create" not in flags, "--target-is-zero requires use of -n flag"),
        ):
            if wrong:
                raise Failure(message)


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    line = _Line(words)
    line.check()
    if line.options.wants_help:
        print_help(line.target_format or "raw", line.names[-1] if line.names else None)
        return 0
    if len(line.names) < 2:
        raise Failure("Must specify image file name")
    cache_mode(line.source_cache, "source cache")
    with ExitStack() as stack:
        shown = stack.enter_context(ProgressLine("progress" in line.flags and "quiet" not in line.flags))
        disks = [
            stack.enter_context(
                open_image(
                    name,
                    format=line.format,
                    image_opts="image_opts" in line.flags,
                    cache=line.source_cache,
                    force_share="force_share" in line.flags,
                    unshared=True,
                )
            )
            for name in line.names[:-1]
        ]
        if line.snapshot is not None and len(disks) > 1:
            raise Failure("No support for concatenating multiple snapshot")
        snapshot = line.snapshot.find(disks[0]) if line.snapshot is not None else None
        target: Disk | str = line.names[-1]
        options: dict[str, Any] = {}
        if "no_create" in line.flags:
            cache_mode(line.cache)
            target = stack.enter_context(_existing(line))
        else:
            options = _creation_options(line)
            # QEMU would notice a wrong mode when the image is there.
            cache_mode(line.cache)
        _convert(line, disks, target, options, snapshot, shown)
    return 0


def _existing(line: _Line) -> Disk:
    target_opts = "target_image_opts" in line.flags
    format = line.target_format if target_opts else line.target_format or "raw"
    return open_image(line.names[-1], format=format, image_opts=target_opts, writable=True, cache=line.cache)


def _creation_options(line: _Line) -> dict[str, Any]:
    """Return the new image's options; what they lack or contradict is refused before anything is made."""
    from cowhand.copy.ops.convert import can_compress
    from cowhand.drivers import REGISTRY

    format = "raw" if line.target_format is None else line.target_format
    entry = REGISTRY.find(format)
    if entry is None:
        raise Failure(f"Unknown file format '{format}'")
    known = known_options(format, line.names[-1])
    options = line.options.values(known)
    for name, value, text in (
        ("backing_file", line.backing, "Backing file"),
        ("backing_fmt", line.backing_format, "Backing file format"),
    ):
        if value is not None and name not in known:
            raise Failure(f"{text} not supported for file format '{format}'")
        if value is not None:
            options[name] = value
    if line.backing is not None and len(line.names) > 2:
        raise Failure(_CONCATENATED)
    if "backing_file" in options and not options.get("backing_fmt"):
        raise Failure("Use of backing file requires explicit backing format")
    if "compressed" in line.flags and not can_compress(entry.load()):
        raise Failure("Compression not supported for this file format")
    return options


def _convert(
    line: _Line,
    disks: Sequence[Disk],
    target: Disk | str,
    options: dict[str, Any],
    snapshot: str | SnapshotInfo | None,
    shown: ProgressLine,
) -> None:
    from cowhand.copy.ops.convert import convert

    flags = line.flags
    backing = options.pop("backing_file", line.backing)
    backing_format = options.pop("backing_fmt", line.backing_format)
    try:
        convert(
            disks,
            target,
            line.target_format or "raw",
            options=options or None,
            backing=backing,
            backing_format=backing_format,
            target_is_zero="target_is_zero" in flags,
            overwrite=True,
            like_qemu=True,
            snapshot=snapshot,
            compressed="compressed" in flags,
            sparse_size=_DEFAULT_SPARSE if line.sparse is None else line.sparse,
            workers=line.workers,
            in_order="out_of_order" not in flags,
            salvage="salvage" in flags,
            copy_range="copy_range" in flags,
            rate_limit=line.rate,
            bitmaps="bitmaps" in flags,
            skip_broken_bitmaps="skip_broken_bitmaps" in flags,
            cache=line.cache,
            warn=None if "quiet" in flags else program.warning,
            progress=shown.progress(),
        )
    except CowhandError as error:
        missing = error.qemu().removesuffix(_NO_BACKING)
        if missing == error.qemu():
            raise Failure(error.qemu(), hint=error.facts.get("advice") or "") from error
        # QEMU finds that out when it opens the new image.
        raise Failure(f"Could not open '{line.names[-1]}': Could not open backing file: {missing}") from error

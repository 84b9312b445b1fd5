"""The long names that QEMU 10.1 gave the options of every command, and what its per-command help says here.

They are accepted whatever version's text is asked for: nothing that meant something else is taken from older command lines.
Source: QEMU 10.1's ``docs/tools/qemu-img.rst`` and ``qemu-img COMMAND --help`` for the names.
"""

from __future__ import annotations

_OPEN = {"format": "f", "quiet": "q"}
_PROGRESS = {"progress": "p", "quiet": "q"}

#: Command → long name → the option that it stands for. ``quiet`` and the like mean nothing where the short option is unknown.
LONG_NAMES: dict[str, dict[str, str]] = {
    "amend": {**_OPEN, **_PROGRESS, "options": "o", "cache": "t"},
    "bench": {
        **_OPEN, "count": "c", "depth": "d", "offset": "o", "buffer-size": "s", "step-size": "S", "cache": "t", "aio": "i",
        "native": "n", "write": "w",
    },
    "bitmap": {"format": "f"},
    "check": {**_OPEN, "cache": "T", "repair": "r"},
    "commit": {**_OPEN, **_PROGRESS, "cache": "t", "drop": "d", "base": "b", "rate-limit": "r"},
    "compare": {**_PROGRESS, "a-format": "f", "b-format": "F", "strict": "s", "cache": "T"},
    "convert": {
        **_PROGRESS, "source-format": "f", "source-image-opts": "image-opts", "source-cache": "T", "snapshot": "l", "target-format": "O",
        "target-format-options": "o", "target-cache": "t", "backing": "B", "backing-format": "F", "sparse-size": "S", "no-create": "n",
        "compress": "c", "rate-limit": "r", "parallel": "m", "oob-writes": "W", "copy-range-offloading": "C",
    },
    "create": {**_OPEN, "options": "o", "backing": "b", "backing-format": "F", "backing-unsafe": "u"},
    "dd": {"format": "f", "output-format": "O"},
    "info": {"format": "f"},
    "map": {"format": "f"},
    "measure": {"format": "f", "snapshot": "l", "target-format": "O", "options": "o", "target-format-options": "o"},
    "rebase": {
        **_OPEN, **_PROGRESS, "cache": "t", "compress": "c", "backing": "b", "backing-format": "F", "backing-cache": "T", "backing-unsafe": "u",
    },
    "resize": {**_OPEN},
    "snapshot": {"quiet": "q", "list": "l", "apply": "a", "create": "c", "delete": "d"},
}  # fmt: skip

#: Letters that changed, understood when 10.1 or later is asked for.
LATER_LETTERS: dict[str, dict[str, str]] = {
    "create": {"B": "F"},
    "rebase": {"B": "F"},
    "convert": {"b": "B"},
    "measure": {"s": "size"},
}

_WORDS = {
    "a-format": "format of the first image (default: found out)",
    "aio": "threads, native or io_uring",
    "add": "make a bitmap",
    "apply": "go back to a snapshot",
    "b-format": "format of the second image (default: found out)",
    "backing": "backing file",
    "backing-cache": "how the new backing file is cached",
    "backing-chain": "tell of every image below as well",
    "backing-format": "format of the backing file",
    "backing-unsafe": "do not look at the backing file",
    "base": "image below into which is committed (default: the next one); implies --drop",
    "buffer-size": "bytes of one request",
    "cache": "how the image is cached: none, writeback, writethrough, directsync, unsafe",
    "clear": "take away all that it marks",
    "disable": "do not mark writes any more",
    "enable": "mark writes",
    "flush-interval": "flush after so many writes",
    "granularity": "bytes that one bit stands for",
    "merge": "add what another bitmap marks",
    "native": "use native asynchronous requests",
    "no-drain": "do not wait for other requests before a flush",
    "pattern": "byte that is written",
    "remove": "delete a bitmap",
    "source-file": "image that holds the bitmap to be merged",
    "write": "write instead of reading",
    "compress": "store compressed clusters",
    "copy-range-offloading": "let the kernel copy where it can",
    "count": "number of requests",
    "create": "take a snapshot",
    "delete": "delete a snapshot",
    "depth": "requests at once",
    "drop": "leave the image as it is instead of emptying it",
    "force": "change it although that may lock the image up",
    "force-share": "open although another process is writing",
    "format": "format of the image (default: found out; of a new one: raw)",
    "help": "show this help and exit",
    "image-opts": "the name is an option string, not a path",
    "limits": "tell the limits of requests as well",
    "list": "list the snapshots (default)",
    "max-length": "bytes to look at",
    "no-create": "write into an image that exists",
    "object": "an object that images can refer to",
    "offset": "where the first request goes",
    "oob-writes": "let the workers write out of order",
    "options": "NAME=VALUE,... of the format; help lists them",
    "output": "human or json",
    "output-format": "format of the new image (default: raw)",
    "parallel": "number of workers, 1 to 16",
    "preallocation": "off, metadata, falloc or full",
    "progress": "show progress",
    "quiet": "print nothing but errors",
    "rate-limit": "bytes a second, at most",
    "repair": "leaks or all",
    "salvage": "read zeroes where reading fails",
    "shrink": "allow to make it shorter",
    "size": "size of the disk",
    "skip-broken-bitmaps": "leave out bitmaps that cannot be used",
    "bitmaps": "copy persistent bitmaps as well",
    "snapshot": "internal snapshot to read",
    "source-cache": "how the source is cached",
    "source-format": "format of the sources (default: found out)",
    "sparse-size": "bytes of zeroes that are worth leaving out",
    "start-offset": "where to begin",
    "step-size": "bytes between two requests",
    "strict": "also tell apart sizes and what is allocated",
    "target-cache": "how the target is cached (default: unsafe)",
    "target-format": "format of the target (default: raw)",
    "target-format-options": "NAME=VALUE,... of the target's format; help lists them",
    "target-image-opts": "the target's name is an option string",
    "target-is-zero": "the target reads as zeroes already",
}


def command_help(tool: str, command: str, syntax: str, short: dict[str, bool], long: dict[str, str]) -> str:
    """Return the help of one command: *syntax* from the tool's help, *short* letters and whether an argument follows, *long* names."""
    letters: dict[str, str] = {}
    lines = []
    for name, key in sorted({**long, **LONG_NAMES.get(command, {})}.items()):
        if key in letters or (len(key) == 1 and key not in short):
            continue
        letters[key] = name
        argument = f" {name.rsplit('-', 1)[-1].upper()}" if key.endswith("=") or short.get(key) else ""
        letter = f"-{key}, " if len(key) == 1 else "    "
        lines.append(f"  {letter}--{name}{argument}\n        {_WORDS.get(name, 'see the manual')}")
    return f"usage: {tool} {syntax}\n\n" + "\n".join(lines)

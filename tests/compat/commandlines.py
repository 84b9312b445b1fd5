"""Command lines of the image tool, drawn from tables: each command's options with values good and bad, and what its positionals may be.

The same seed draws the same lines. What a scene tells once and for all belongs there; this finds what nobody thought of.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Lines of ``play`` that prepare the folder in which each command line is run.
FOLDER = """\
qemu-img create -q -f raw base.raw 1M
qemu-io -f raw -c 'write -P 1 0 64k' -c 'write -P 2 512k 64k' base.raw
qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2 1536k
qemu-io -c 'write -P 3 128k 64k' -c 'write -z 192k 64k' -c 'write -c -P 4 256k 64k' mid.qcow2
qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2
qemu-io -c 'write -P 5 0 32k' -c 'write -P 6 1M 100k' top.qcow2
qemu-img create -q -f qcow2 snap.qcow2 512k
qemu-io -c 'write -P 7 0 64k' snap.qcow2
qemu-img snapshot -c one snap.qcow2
qemu-io -c 'write -P 8 64k 64k' snap.qcow2
qemu-img create -q -f qcow2 -u -b gone.raw -F raw orphan.qcow2 256k
qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=4k old.qcow2 256k
text text.txt 'no image, only text'
text empty ''
folder folder
"""

_IMAGES = ["base.raw", "mid.qcow2", "top.qcow2", "snap.qcow2", "old.qcow2", "orphan.qcow2"]
_ODD = ["nofile", "folder", "text.txt", "empty", "", "foo:bar", "json:{}", "json:{'driver':'qcow2'}", "nbd:foo"]
_NAMES = _IMAGES * 4 + _ODD + [
    "json:{'driver':'qcow2','file':{'driver':'file','filename':'mid.qcow2'}}",
    "json:{'driver':'raw','file.filename':'base.raw'}",
    "file:base.raw",
    "null-co://",
]  # fmt: skip
_OPTION_STRINGS = [
    "driver=qcow2,file.filename=mid.qcow2",
    "driver=raw,file.filename=base.raw",
    "file.filename=top.qcow2",
    "file.driver=file,file.filename=snap.qcow2",
    "driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=mid.qcow2",
    "driver=raw,offset=64k,size=64k,file.filename=base.raw",
    "driver=null-co,size=1M",
    "driver=foo",
    "mid.qcow2",
    "driver=qcow2",
    "driver=qcow2,file.filename=mid.qcow2,nothing=1",
    "driver=qcow2,file.filename=mid.qcow2,read-only=on",
    "driver=qcow2,file.filename=mid.qcow2,lazy-refcounts=maybe",
]
_FORMATS = ["raw", "qcow2", "qcow2", "raw", "foo", "", "file", "host_device"]
_CACHES = ["none", "writeback", "writethrough", "directsync", "unsafe", "off", "foo", ""]
_SIZES = [
    "1M",
    "64k",
    "0",
    "1",
    "1000",
    "1.5M",
    "0x10000",
    "-1",
    "foo",
    "",
    "1e3",
    "9E",
    "16E",
    "2M",
    "1k1",
    "99999999999999999999",
]
_RATES = ["1G", "100M", "0", "-1", "foo", ""]
_OUTPUTS = ["json", "human", "xml", ""]
_NEW = ["new.img", "new.img", "new.img", "folder/new.img", "nofolder/new.img", "mid.qcow2", "folder", "null-co://"]
_SNAPSHOTS = [
    "one",
    "1",
    "two",
    "",
    "snapshot.id=1",
    "snapshot.name=one",
    "snapshot.id=9",
    "snapshot.foo=1",
    "snapshot.id=1,snapshot.name=one",
]
_CREATION = [
    "cluster_size=4k", "cluster_size=1000", "compat=0.10", "compat=v3", "compat=9", "size=1M", "preallocation=metadata", "preallocation=full",
    "preallocation=foo", "lazy_refcounts=on", "lazy_refcounts=x", "refcount_bits=1", "refcount_bits=3", "foo=bar", "", "help", "?",
    "compression_type=zstd", "compression_type=foo", "extended_l2=on", "extended_l2=on,cluster_size=128k", "backing_file=base.raw",
    "backing_file=base.raw,backing_fmt=raw", "nocow=on", "cluster_size=64k,,", "cluster_size", "nolazy_refcounts", "data_file=d.raw",
    "data_file_raw=on", "encryption=off", "extent_size_hint=2M", "refcount_bits=64,compat=0.10", "size=1M,size=2M", "cluster_size=4M",
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command's options, "-x" or "--long", each with its values (none: a switch), and what each of its positionals may be."""

    options: dict[str, list[str]]
    positionals: list[list[str]]
    opts: bool = False  #: ``--image-opts`` may stand for a name
    own_help: bool = False  #: wrong options show the help, which has its own words here
    more: list[str] = field(default_factory=lambda: ["too-much"])


_COMMON: dict[str, list[str]] = {"-f": _FORMATS}
_SWITCH: list[str] = []

COMMANDS: dict[str, Command] = {
    "create": Command(
        {"-f": _FORMATS, "-o": _CREATION, "-b": [*_IMAGES, "nofile", ""], "-F": _FORMATS, "-u": _SWITCH, "-q": _SWITCH},
        [_NEW, [*_SIZES, "1M", "1M", "1M"]],
    ),
    "info": Command({**_COMMON, "--output": _OUTPUTS, "--backing-chain": _SWITCH, "-U": _SWITCH}, [_NAMES], opts=True),
    "check": Command(
        {**_COMMON, "--output": _OUTPUTS, "-r": ["leaks", "all", "foo"], "-T": _CACHES, "-q": _SWITCH, "-U": _SWITCH},
        [_NAMES],
        opts=True,
    ),
    "map": Command(
        {
            **_COMMON,
            "--output": _OUTPUTS,
            "-s": _SIZES,
            "-l": _SIZES,
            "--start-offset": _SIZES,
            "--max-length": _SIZES,
            "-U": _SWITCH,
        },
        [_NAMES],
        opts=True,
    ),
    "measure": Command(
        {
            **_COMMON,
            "-O": _FORMATS,
            "-o": _CREATION,
            "-l": _SNAPSHOTS,
            "--size": _SIZES,
            "--output": _OUTPUTS,
            "-U": _SWITCH,
        },
        [_NAMES],
        opts=True,
        own_help=True,
    ),
    "compare": Command(
        {**_COMMON, "-F": _FORMATS, "-T": _CACHES, "-p": _SWITCH, "-q": _SWITCH, "-s": _SWITCH, "-U": _SWITCH},
        [_NAMES, _NAMES],
        opts=True,
    ),
    "commit": Command(
        {
            **_COMMON,
            "-t": _CACHES,
            "-b": [*_IMAGES, "nofile", ""],
            "-d": _SWITCH,
            "-p": _SWITCH,
            "-q": _SWITCH,
            "-r": _RATES,
        },
        [_NAMES],
        opts=True,
    ),
    "convert": Command(
        {
            **_COMMON,
            "-O": _FORMATS,
            "-B": [*_IMAGES, "nofile"],
            "-F": _FORMATS,
            "-o": _CREATION,
            "-l": _SNAPSHOTS,
            "-t": ["none", "unsafe", "writethrough"],
            "-T": _CACHES,
            "-S": [*_SIZES, "4k", "512"],
            "-m": ["1", "16", "17", "0", "x"],
            "-r": _RATES,
            "-c": _SWITCH,
            "-p": _SWITCH,
            "-q": _SWITCH,
            "-n": _SWITCH,
            "-U": _SWITCH,
            "-C": _SWITCH,
            "-W": _SWITCH,
            "--salvage": _SWITCH,
            "--target-is-zero": _SWITCH,
            "--target-image-opts": _SWITCH,
            "--skip-broken-bitmaps": _SWITCH,
        },
        [_NAMES, _NEW],
        opts=True,
        more=["mid.qcow2", "new2.img"],
    ),
    "dd": Command(
        {**_COMMON, "-O": _FORMATS, "-U": _SWITCH},
        [
            [f"if={name}" for name in _NAMES],
            [f"of={name}" for name in _NEW],
            [*(f"bs={size}" for size in _SIZES if size not in ("1", "1000")), "bs=4k", "bs=64k"],
            [*(f"count={size}" for size in _SIZES), *(f"skip={size}" for size in _SIZES), "foo=1", "seek=1"],
        ],
        opts=True,
    ),
    "resize": Command(
        {
            **_COMMON,
            "--preallocation": ["off", "metadata", "falloc", "full", "foo"],
            "-q": _SWITCH,
            "--shrink": _SWITCH,
        },
        [_NAMES, [*_SIZES, "+1M", "-64k", "+0", "+foo", "+", "-2M"]],
    ),
    "snapshot": Command(
        {
            "-l": _SWITCH,
            "-a": ["one", "1", "two", ""],
            "-c": ["two", "one", ""],
            "-d": ["one", "1", "two", ""],
            "-q": _SWITCH,
            "-U": _SWITCH,
        },
        [_NAMES],
        opts=True,
    ),
    # Version 2 has no zeroes: what QEMU writes to hide a new backing file there is lost.
    "rebase": Command(
        {
            **_COMMON,
            "-b": [*_IMAGES, "nofile", ""],
            "-F": _FORMATS,
            "-u": _SWITCH,
            "-p": _SWITCH,
            "-q": _SWITCH,
            "-U": _SWITCH,
            "-t": _CACHES,
            "-T": _CACHES,
        },
        [[name for name in _NAMES if name != "old.qcow2"]],
        opts=True,
    ),
    "amend": Command(
        {**_COMMON, "-o": _CREATION, "-t": _CACHES, "-p": _SWITCH, "-q": _SWITCH, "--force": _SWITCH},
        [_NAMES],
        opts=True,
    ),
}
_STRANGE = ["-Z", "--nothing", "-", "--", "--outp=json", "--help=1", "-f", "-o"]


def draw(seed: int, count: int) -> Iterator[list[str]]:
    """Yield *count* command lines."""
    rng = random.Random(seed)
    names = sorted(COMMANDS)
    for number in range(count):
        name = names[number % len(names)]
        yield ["qemu-img", name, *_arguments(rng, COMMANDS[name])]


def _arguments(rng: random.Random, command: Command) -> list[str]:
    words: list[list[str]] = []
    for option in rng.sample(sorted(command.options), min(len(command.options), rng.choice((0, 1, 1, 2, 2, 3)))):
        values = command.options[option]
        words.append([option, *([rng.choice(values)] if values else [])])
    positionals = [[rng.choice(values)] for values in command.positionals]
    if command.opts and rng.random() < 0.12:
        words.append(["--image-opts"])
        prefix = "if=" if positionals[0][0].startswith("if=") else ""
        positionals[0] = [prefix + rng.choice(_OPTION_STRINGS)]
    if rng.random() < 0.05:
        positionals.pop(rng.randrange(len(positionals)))
    if rng.random() < 0.03:
        positionals.insert(len(positionals) - 1 if positionals else 0, [rng.choice(command.more)])
    if rng.random() < 0.03 and not command.own_help:
        words.append([rng.choice(_STRANGE)])
    rng.shuffle(words)
    if rng.random() < 0.2:  # options may stand behind
        positionals, words = words, positionals
    drawn = [word for group in words + positionals for word in group]
    if "9E" in drawn and any(word in drawn for word in ("full", "preallocation=full")):
        drawn[drawn.index("9E")] = "2M"  # QEMU writes until the disk is full, which is nobody's business beside it
    return drawn

"""Scripts of random commands, right and wrong ones: both I/O tools say the same of every one, and leave the same disk.

``COWHAND_TEST_SCALE=50`` plays fifty times as many.
"""

from __future__ import annotations

import os
import random
import shlex
from pathlib import Path

import pytest

from tests.compat.sides import play
from tests.tools.qemu import require_qemu

pytestmark = [pytest.mark.interop, require_qemu]

SCALE = int(os.environ.get("COWHAND_TEST_SCALE", "1"))
SIZE = 1 << 20

#: What makes the images of a stage, and how the tool opens them; {seed} differs from script to script.
STAGES = {
    "raw": (["qemu-img create -q -f raw disk 1M"], "-f raw disk"),
    "raw odd": (["qemu-img create -q -f raw disk 1M", "truncate disk 1000001"], "-f raw disk"),
    "raw direct": (["qemu-img create -q -f raw disk 1M"], "-n -f raw disk"),
    "raw window": (["qemu-img create -q -f raw disk 3M"], "--image-opts driver=raw,offset=5120,size=1M,file.filename=disk"),
    "qcow2": (["qemu-img create -q -f qcow2 disk 1M"], "disk"),
    "qcow2 small": (["qemu-img create -q -f qcow2 -o cluster_size=4k,compat=0.10 disk 1M"], "disk"),
    "qcow2 subclusters": (["qemu-img create -q -f qcow2 -o extended_l2=on disk 1M"], "disk"),
    "qcow2 chain": (
        [
            "qemu-img create -q -f qcow2 base 700k",
            "qemu-io -c 'write -q -P 11 0 300k' -c 'write -q -z 100k 64k' base",
            "qemu-img create -q -f qcow2 -b base -F qcow2 disk 1M",
        ],
        "disk",
    ),
    "blkdebug": (
        ["qemu-img create -q -f qcow2 disk 1M"],
        "--image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=disk,file.align=4k,file.max-transfer=64k",
    ),
    "null": ([], "--image-opts driver=null-co,size=1M,read-zeroes=on"),
    "null plain": ([], "--image-opts driver=null-co,size=1000000"),
}  # fmt: skip

_NUMBERS = ("0", "1", "511", "512", "4k", "64k", "100k", "0x1000", "1M", "1048575", "65535", "3.5k", "900k")
_WRONG = ("-1", "1e3", "abc", "", "3Q", "16E", "9E", "0x", "1.3", "2G", "7.5", "+5", "1 k")


def _number(chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.04:
        return chance.choice(_WRONG)
    if kind < 0.4:
        return chance.choice(_NUMBERS)
    if kind < 0.7:
        return str(chance.randrange(SIZE // 512) * 512)
    return str(chance.randrange(SIZE))


def _length(chance: random.Random) -> str:
    return _number(chance) if chance.random() < 0.2 else str(chance.choice((1, 100, 512, 4096, 65536, 131072, 200000)))


def _flags(chance: random.Random, known: str, often: str = "") -> str:
    out = [f"-{letter}" for letter in often if chance.random() < 0.5]
    out += [f"-{letter}" for letter in known if chance.random() < 0.06]
    if chance.random() < 0.02:
        out.append(f"-{chance.choice('xZ9')}")
    return " ".join(out)


def command(chance: random.Random) -> str:
    """Return a command of the I/O tool, mostly a right one."""
    offset, length = _number(chance), _length(chance)
    pattern = (
        f"-P {chance.choice((0, 0, 1, 7, 255, 255, 0x5A, '0xa5', '010', 256, 'x'))}" if chance.random() < 0.6 else ""
    )
    name = chance.choice(
        ("read", "read", "readv", "write", "write", "write", "writev", "zero", "zero", "discard", "aio_write", "aio_read",
         "alloc", "map", "length", "flush", "aio_flush", "odd", "reopen", "truncate")
    )  # fmt: skip
    match name:
        case "read":
            part = chance.choice(("", "", f"-s {_number(chance)}", f"-l {_length(chance)}"))
            return f"{chance.choice(('read', 'r'))} {_flags(chance, 'bCpq')} {pattern} {part} {offset} {length}"
        case "readv":
            return f"readv {_flags(chance, 'Cq')} {pattern} {offset} {length} {chance.choice(('', '512', '1k 1'))}"
        case "write":
            return f"{chance.choice(('write', 'w'))} {_flags(chance, 'bcCfnpquz')} {pattern} {offset} {length}"
        case "writev":
            return f"writev {_flags(chance, 'Cfq')} {pattern} {offset} {length} {chance.choice(('', '512', '1k 1'))}"
        case "zero":
            return f"write -z {_flags(chance, 'Cfq', 'u')} {offset} {length}"
        case "discard":
            # Of whole blocks: what a discard leaves of others is anybody's guess.
            offset, length = f"{chance.randrange(256) * 4}k", f"{chance.randrange(1, 60) * 4}k"
            return f"{chance.choice(('discard', 'd'))} {_flags(chance, 'Cq')} {offset} {length}"
        case "aio_write":
            return f"aio_write {_flags(chance, 'Cfiquz')} {pattern} {offset} {length}"
        case "aio_read":
            return f"aio_read {_flags(chance, 'Ciq')} {pattern} {offset} {length}"
        case "alloc":
            return f"{chance.choice(('alloc', 'a'))} {offset} {chance.choice(('', length))}"
        case "odd":
            return chance.choice(
                ("nothing", "help nothing", "read", "write 0", "alloc", "sleep x", "sleep 0", "resume A", "remove_break A", "truncate")
            )  # fmt: skip
        case "reopen":
            return chance.choice(
                ("reopen", "reopen -r", "reopen -w", "reopen -c writeback", "reopen -c nonsense", "reopen -rw")
            )
        case "truncate":
            return (
                f"truncate {chance.choice(('', '-m off', '-m nonsense'))} {chance.choice(('1M', '1M', '1200k', 'x'))}"
            )
    return name


def script(chance: random.Random, length: int = 30) -> list[str]:
    """Return commands; every one in the background is waited for, so that the order of what is printed is one."""
    out = []
    for _ in range(length):
        line = " ".join(command(chance).split())
        out.append(line)
        if line.startswith("aio_"):
            out.append("aio_flush")
    return out


@pytest.mark.parametrize("seed", range(SCALE))
@pytest.mark.parametrize("stage", STAGES)
def test_random_scripts(tmp_path: Path, stage: str, seed: int) -> None:
    chance = random.Random(f"{stage} {seed}")
    make, image = STAGES[stage]
    commands = " ".join(f"-c {shlex.quote(line)}" for line in script(chance))
    lines = [*make, f"qemu-io {commands} {image}"]
    if make:
        lines += [f"qemu-img compare -f {stage.split()[0].replace('blkdebug', 'qcow2')} disk disk"]
        lines += [f"qemu-io -r -c 'read -v 0 {SIZE - 512}' {image}".replace(" -n ", " ")]
    folders = tmp_path / "real", tmp_path / "own"
    for folder in folders:
        folder.mkdir()
    for line in lines:
        expected, found = (play(line, folder, real=folder.name == "real") for folder in folders)
        shown = line.replace(" -c ", " \\\n  -c ")
        assert (found.status, found.out.splitlines(), found.err.splitlines()) == (
            expected.status, expected.out.splitlines(), expected.err.splitlines(),
        ), shown  # fmt: skip

"""Small qcow2 images, made by QEMU and then damaged at random: what check and repair are tried on, against qemu-img."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cowhand.block.node.records import CheckResult
from cowhand.core.errors import CowhandError
from cowhand.image.check import check
from tests.tools.programs import run
from tests.tools.qemu import qemu_img

OFFSET = 0x00FFFFFFFFFFFE00

#: Lines that only say why a command ended, in the words of the tool and not of the check.
_TOOL = ("qemu-img: Check failed", "qemu-img: Could not open", "qemu-img: Could not resize file")


def make(path: Path, rng: random.Random, *, bitmaps: bool = True) -> None:
    """Make an image of a random kind at *path*: written, compressed, zeroed and discarded clusters, snapshots, perhaps a bitmap."""
    cluster = rng.choice((512, 512, 1024, 4096, 65536))
    compat = rng.choice(("0.10", "1.1", "1.1", "1.1"))
    bits = rng.choice((1, 2, 4, 8, 16, 16, 16, 32, 64)) if compat == "1.1" else 16
    size = rng.choice((256 << 10, 1 << 20, 300 << 10, (1 << 20) + 512)) * (1 if cluster < 4096 else 8)
    options = f"cluster_size={cluster},compat={compat}" + (f",refcount_bits={bits}" if compat == "1.1" else "")
    if rng.random() < 0.2:
        options += ",preallocation=metadata"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    for number in range(rng.randrange(1, 12)):
        run("qemu-io", "-f", "qcow2", "-c", _command(rng, size, cluster), path, check=False)
        if bits > 2 and rng.random() < 0.25:
            qemu_img("snapshot", "-c", f"s{number}", path)
    if bitmaps and compat == "1.1" and rng.random() < 0.15:
        qemu_img("bitmap", "--add", path, "b0")


def _command(rng: random.Random, size: int, cluster: int) -> str:
    offset = rng.randrange(size // 512 - 1) * 512
    length = min(size - offset, rng.choice((512, 4096, 19968, 65536)))
    kind = rng.random()
    if kind < 0.6:
        return f"write {offset} {length}"
    if kind < 0.75:
        return f"write -z {offset} {length}"
    if kind < 0.9:
        return f"write -c {offset // cluster * cluster} {cluster}"
    return f"discard {offset} {length}"


def tables(data: bytes | bytearray) -> tuple[list[tuple[str, int, int]], int]:
    """Return (kind, offset, bytes) of the image's tables, and its cluster size."""
    header = struct.unpack_from(">IIQIIQIIQQIIQ", data)
    cluster = 1 << header[4]
    found = [("L1", header[8], header[7] * 8), ("refcount table", header[9], min(header[10] * cluster, len(data)))]
    for kind, begin, length in list(found):
        for at in range(begin, begin + min(length, len(data) - begin), 8):
            offset = struct.unpack_from(">Q", data, at)[0] & OFFSET
            if offset and offset + cluster <= len(data):
                found.append(("L2" if kind == "L1" else "refcount block", offset, cluster))
    if header[11]:
        found.append(("snapshot table", header[12], 200))
    return found, cluster


def damage(data: bytearray, rng: random.Random, *, cut: bool = True, kinds: tuple[str, ...] = ()) -> list[str]:
    """Change a few entries of the image's tables (of *kinds*, or of any), or *cut* the file; return what was done."""
    found, cluster = tables(data)
    found = [table for table in found if not kinds or table[0] in kinds]
    done: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind, begin, length = rng.choice(found)
        at = begin
        for _ in range(20):
            at = begin + rng.randrange(length // 8) * 8
            if any(data[at : at + 8]):
                break
        if at + 8 > len(data):
            continue
        entry = _changed(struct.unpack_from(">Q", data, at)[0], rng, data, begin, length, cluster)
        struct.pack_into(">Q", data, at, entry)
        done.append(f"{kind} entry at {at:#x} is {entry:#x}")
    if cut and rng.random() < 0.05:
        length = rng.randrange(len(data) // 2, len(data))
        del data[length:]
        done.append(f"cut to {length}")
    return done


def _changed(entry: int, rng: random.Random, data: bytearray, begin: int, length: int, cluster: int) -> int:
    kind = rng.randrange(9)
    if kind <= 1:
        return entry ^ 1 << rng.randrange(64)
    if kind == 2:
        return 0
    if kind <= 4:
        return entry ^ 1 << 63
    if kind == 5:
        return (entry & ~OFFSET) | (rng.randrange(len(data) // cluster + 2) * cluster & OFFSET)
    if kind == 6:
        return rng.getrandbits(64)
    if kind == 7:
        other = begin + rng.randrange(length // 8) * 8
        return struct.unpack_from(">Q", data, other)[0] if other + 8 <= len(data) else 0
    return entry ^ 0x200


@dataclass(slots=True)
class Verdict:
    """What a check says of an image: the exit code, the counts (None when it did not come to its end), and the lines, however ordered."""

    code: int
    counts: dict[str, Any] | None
    lines: Counter[str]


def qemus_verdict(path: Path, repair: str | None = None) -> Verdict:
    """Return what ``qemu-img check`` says of the image, which it repairs."""
    chosen = ["-r", repair] if repair else []
    result = qemu_img("check", "-f", "qcow2", "--output=json", *chosen, path, check=False)
    assert result.status >= 0, "qemu-img crashed"
    counts = json.loads(result.stdout) if result.stdout.strip() else None
    if counts:
        del counts["filename"]
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith(_TOOL)]
    return Verdict(result.status, counts, Counter(line.replace("qemu-img: ERROR", "ERROR") for line in lines))


def our_verdict(path: Path, repair: str | None = None) -> Verdict:
    """Return what cowhand says of the image, which it repairs."""
    try:
        result = check(path, format="qcow2", repair=repair)
    except CowhandError:
        return Verdict(1, None, Counter())
    return Verdict(result.exit_code, counts_of(result), Counter(result.messages))


def counts_of(result: CheckResult) -> dict[str, Any] | None:
    """Return QEMU's counts of *result*; None when the check did not come to its end."""
    if result.failure is not None:
        return None
    counts = result.to_json()
    del counts["filename"]
    return counts

"""Lives of drawn images: the same commands are given to QEMU's tools on one copy and to the drop-in ones on another, or to both in turn on one."""

from __future__ import annotations

import difflib
import json
import random
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.compat.sides import Outcome, run_own, run_real
from tests.foreign.images import Image

_OUTDATED = re.compile(r"[^\n]*warning: a program lacking bitmap support[^\n]*\n[^\n]*\n")

_AMENDED = (
    "lazy_refcounts=on",
    "lazy_refcounts=off",
    "compat=1.1",
    "refcount_bits=16",
    "refcount_bits=64",
    "compat=0.10",
)


def requests(rng: random.Random, size: int, cluster: int) -> list[str]:
    """Return one qemu-io's commands."""
    out: list[str] = []
    if size < 512:
        return ["flush"]
    for _ in range(rng.randint(1, 6)):
        length = rng.choice((512, cluster, 3 * cluster + 512, rng.randrange(1, 5 * cluster)))
        length = min(length, size)
        offset = rng.randrange(size - length + 1)
        verb = rng.choices(("write -P", "write -z", "write -z -u", "discard", "write -c -P"), (5, 2, 1, 2, 1))[0]
        if verb == "write -c -P":
            offset -= offset % cluster
            length = min(cluster, size - offset)
        else:
            offset -= offset % rng.choice((1, 512, cluster))
        filled = f"{verb} {rng.randrange(1, 255)}" if verb.endswith("-P") else verb
        out.append(f"{filled} {offset} {length}")
    return out


class Life:
    """Draws commands that the image can take. ``names`` are the snapshots that it should have."""

    def __init__(self, rng: random.Random, image: Image) -> None:
        self.rng, self.image = rng, image
        self.size = image.size - image.size % 512
        self.names = [s.name.decode() for s in image.snapshots if s.name and not s.name.isdigit()]
        self.bitmaps = 0

    def lines(self, count: int) -> Iterator[list[str]]:
        """Yield commands."""
        if {"leaks", "dirty"} & self.image.odd and self.rng.random() < 0.5:
            yield ["qemu-img", "check", "-r", self.rng.choice(("leaks", "all")), "disk.qcow2"]
        for _ in range(count):
            yield self._line()

    def _line(self) -> list[str]:
        rng = self.rng
        kind = rng.choices(
            ("io", "create", "apply", "delete", "grow", "shrink", "rebase", "amend", "check", "bitmap"),
            (12, 2, 2, 2, 1, 1, 1, 1, 1, 2),
        )[0]
        if kind in ("apply", "delete") and self.names:
            name = rng.choice(self.names)
            if kind == "delete":
                self.names.remove(name)
            return ["qemu-img", "snapshot", "-a" if kind == "apply" else "-d", name, "disk.qcow2"]
        if kind == "create":
            name = f"new{rng.randrange(1000)}"
            self.names.append(name)
            return ["qemu-img", "snapshot", "-c", name, "disk.qcow2"]
        if kind in ("grow", "shrink"):
            wanted = rng.randrange(1, max(2, 2 * self.size // 512)) * 512
            self.size = min(self.size, wanted)
            return ["qemu-img", "resize", "--shrink", "disk.qcow2", str(wanted)]
        if kind == "rebase":
            return ["qemu-img", "rebase", "-u", "-b", *rng.choice((("",), ("b", "-F", "raw"))), "disk.qcow2"]
        if kind == "amend":
            # QEMU's way to version 2 writes through what shared tables name.
            options = _AMENDED[: len(_AMENDED) - (self.image.most_count > 1)]
            return ["qemu-img", "amend", "-o", rng.choice(options), "disk.qcow2"]
        if kind == "check":
            return ["qemu-img", "check", "-r", rng.choice(("leaks", "all")), "disk.qcow2"]
        if kind == "bitmap":
            name = rng.choice(("b0", "b1", "y1", "new"))
            verb = rng.choice(("--add", "--remove", "--clear", "--enable", "--disable"))
            return ["qemu-img", "bitmap", verb, "disk.qcow2", name]
        words = ["qemu-io", "-f", "qcow2", "-d", rng.choice(("unmap", "ignore"))]
        for command in requests(rng, self.size, self.image.shape.cluster):
            words += ["-c", command]
        return [*words, "disk.qcow2"]


def lived_differently(image: Image, seed: int, count: int = 6) -> Iterator[str]:
    """Yield what differs between an image that QEMU's tools changed and one that the drop-in tools changed in the same way."""
    if {"size", "backing format"} & image.odd:
        return  # QEMU sees another disk, or none
    folder = image.path.parent
    sides = folder / "theirs", folder / "ours", folder / "both"
    for side in sides:
        side.mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".raw":
                shutil.copy(file, side)
    done: list[str] = []
    for words in Life(random.Random(f"life {seed}"), image).lines(count):
        done.append(" ".join(words))
        if "resize" in words and ("behind" in image.odd or image.shape.version == 2):
            continue  # QEMU shows what lies behind the disk's end when it grows, and refuses version 2 over a backing file
        theirs, ours = run_real(words, sides[0]), run_own(words, sides[1])
        (run_real if len(done) % 2 else run_own)(words, sides[2])
        # Where QEMU gives up half-way it leaks, and has more to repair than there is here.
        if words[1] == "check" and _snapshots(sides[0]) != _snapshots(sides[1]):
            return  # QEMU 7.2 drops all snapshots when it repairs an image that has bitmaps, or autoclear bits that it does not know
        if words[1] == "check" and ours.status == 0 and (theirs.status == 0 or "bitmap extra" in image.odd):
            continue
        if _comparable(theirs) != _comparable(ours):
            yield f"after {done}: {apart(theirs, ours)}"
            return
        wrong = _check(sides)
        if wrong:
            yield f"after {done}: {wrong}"
            return
    for words in (["info", "--output=json"], ["map", "--output=json"], ["check", "--output=json"]):
        command = ["qemu-img", *words, "disk.qcow2"]
        theirs, ours = run_real(command, sides[1]), run_own(command, sides[1])
        if ours != theirs and not {"bitmap extra"} & image.odd:
            yield f"after {done}: {words[0]} of our file: {apart(theirs, ours)}"
    yield from _same_content(sides, done)


def _snapshots(side: Path) -> bytes:
    with (side / "disk.qcow2").open("rb") as file:
        return file.read(64)[60:]


def _comparable(outcome: Outcome) -> tuple[int, str, str]:
    """Return what of *outcome* has to be the same: clusters may be taken elsewhere, and QEMU drops bitmaps that are out of date with any header."""
    out = "\n".join(
        line
        for line in outcome.out.splitlines()
        if not line.startswith("Image end offset") and "fragmented" not in line
    )
    return outcome.status, out, _OUTDATED.sub("", outcome.err)


def _check(sides: tuple[Path, ...]) -> str:
    """Return what QEMU's check tells of our results that it does not tell of its own."""
    theirs, *others = (run_real(["qemu-img", "check", "--output=json", "disk.qcow2"], side) for side in sides)
    if theirs.status not in (0, 2, 3):
        return "" if others[0].status == 0 else apart(theirs, others[0])  # QEMU broke it
    for number, other in enumerate(others):
        counts = json.loads(other.out)
        own = json.loads(theirs.out)
        keys = ("corruptions", "leaks")[: 2 - number]  # QEMU leaks in turn as well
        if counts["check-errors"] or any(counts.get(key, 0) > own.get(key, 0) for key in keys):
            return f"QEMU checks {sides[number + 1].name}: {apart(theirs, other)}"
    return ""


def _same_content(sides: tuple[Path, ...], done: list[str]) -> Iterator[str]:
    listed = run_real(["qemu-img", "info", "--output=json", "disk.qcow2"], sides[0])
    for chosen in [[], *(["-l", f"snapshot.id={ident}"] for ident in re.findall(r'"id": "(\S+)"', listed.out))]:
        found = []
        for side in sides:
            outcome = run_real(
                ["qemu-img", "convert", "-f", "qcow2", *chosen, "-O", "raw", "disk.qcow2", "disk.raw"], side
            )
            found.append((outcome, (side / "disk.raw").read_bytes() if outcome.status == 0 else b""))
        for side, one in zip(sides[1:], found[1:], strict=True):
            if one != found[0]:
                yield f"after {done}: {chosen} of {side.name} differs: {found[0][0]} {one[0]}"
    kept = [kept_of((side / "disk.qcow2").read_bytes()) for side in sides]
    for side, one in zip(sides[1:], kept[1:], strict=True):
        if one != kept[0]:
            yield f"after {done}: the header of {side.name} differs: {kept[0]} {one}"


def kept_of(data: bytes) -> dict[str, object]:
    """Return what every program keeps of a header that it does not understand, and the feature bits."""
    version, length = struct.unpack_from(">I", data, 4)[0], 72
    out: dict[str, object] = {"version": version}
    if version > 2:
        length = struct.unpack_from(">I", data, 100)[0]
        out["features"] = struct.unpack_from(">QQQ", data, 72)
        out["tail"] = data[112:length].rstrip(b"\0")
    end, at, unknown = struct.unpack_from(">Q", data, 8)[0] or 1 << struct.unpack_from(">I", data, 20)[0], length, []
    while at + 8 <= end:
        kind, size = struct.unpack_from(">II", data, at)
        if not kind:
            break
        if kind not in (0x6803F857, 0x23852875):
            unknown.append((kind, data[at + 8 : at + 8 + size]))
        at += 8 + size + -size % 8
    out["extensions"] = sorted(unknown)
    return out


def apart(theirs: Outcome, ours: Outcome) -> str:
    """Return the lines that are QEMU's alone (-) and ours alone (+)."""
    lines = [f"{outcome.status}\n{outcome.out}\n{outcome.err}".splitlines() for outcome in (theirs, ours)]
    return "\n".join(line for line in difflib.ndiff(*lines) if line[0] in "-+")

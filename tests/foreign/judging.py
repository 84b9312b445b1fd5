"""What QEMU's tools and the drop-in ones say of a drawn image, side by side, and what they make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.compat.sides import Outcome, run_own, run_real
from tests.foreign.images import Image
from tests.foreign.living import apart

READING = (
    "info --output=json disk.qcow2",
    "info disk.qcow2",
    "check --output=json disk.qcow2",
    "check disk.qcow2",
    "map --output=json disk.qcow2",
    "measure --output=json -O qcow2 disk.qcow2",
    "snapshot -l disk.qcow2",
)


def both(words: list[str], folder: Path) -> tuple[Outcome, Outcome]:
    """Run the same command by both; return (QEMU's, ours)."""
    return run_real(words, folder), run_own(words, folder)


def told_differently(image: Image) -> Iterator[str]:
    """Yield what the two sides say of *image* that is not the same, or not what was drawn."""
    folder = image.path.parent
    refused = False
    for line in READING:
        words = ["qemu-img", *line.split()]
        theirs, ours = both(words, folder)
        refused |= theirs.status != 0 and not line.startswith("check")
        if line.startswith("check") and {"size", "bitmap extra"} & image.odd:
            continue  # ours looks at the whole disk, and follows what QEMU does not open
        if theirs != ours:
            yield f"{line}: {apart(theirs, ours)}"
    yield from _contents(image, refused, [], image.content, "the disk")
    for number, snapshot in enumerate(image.snapshots):
        if not snapshot.name or not snapshot.ident:
            continue
        chosen = ["-l", f"snapshot.id={snapshot.ident.decode()},snapshot.name={snapshot.name.decode()}"]
        if not set(chosen[1]) & set(" '\"\\"):
            yield from _contents(image, refused, chosen, snapshot.content, f"snapshot {number}")


def _contents(image: Image, refused: bool, chosen: list[str], expected: bytes, what: str) -> Iterator[str]:
    folder = image.path.parent
    command = ["qemu-img", "convert", "-f", "qcow2", *chosen, "-O", "raw", "disk.qcow2"]
    theirs, ours = run_real([*command, "theirs.raw"], folder), run_own([*command, "ours.raw"], folder)
    if theirs != ours:
        yield f"converting {what}: {apart(theirs, ours)}"
    if theirs.status or ours.status:
        if not refused and theirs.status:
            yield f"converting {what}: QEMU cannot: {theirs}"
        if ours.status:
            return
    found = (folder / "ours.raw").read_bytes()
    if theirs.status == 0:
        told = (folder / "theirs.raw").read_bytes()
        # QEMU gives a snapshot the present size of the disk.
        common = min(len(found), len(told)) if chosen else max(len(found), len(told))
        if found[:common] != told[:common]:
            yield f"{what} has other content: {_difference(found, told)}"
    common = min(len(found), len(expected))
    if (
        found[:common] != expected[:common]
        or found[common:].strip(b"\0")
        or common < len(expected) - len(expected) % 512
    ):
        yield f"{what} is not what was drawn: {_difference(found, expected)}"


def _difference(found: bytes, expected: bytes) -> str:
    for at in range(0, min(len(found), len(expected)), 512):
        if found[at : at + 512] != expected[at : at + 512]:
            return f"at {at:#x}: {found[at : at + 16].hex()} instead of {expected[at : at + 16].hex()}"
    return f"{len(found)} bytes instead of {len(expected)}"

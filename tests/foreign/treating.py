"""What cowhand itself does with drawn images: compacting, repairing, converting. Guest, snapshots and bitmaps stay as they were drawn."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import cowhand
from cowhand.core.errors import CowhandError
from cowhand.image import snapshots
from cowhand.image.compact import compact
from tests.compat.sides import run_own, run_real
from tests.foreign.images import Image
from tests.foreign.living import kept_of

#: Images that are refused, or whose directory of bitmaps QEMU cannot open.
_REFUSED = {"unknown", "corrupt", "backing format"}


def mistreated(image: Image, seed: int) -> Iterator[str]:
    """Yield what is wrong after each treatment of a copy of *image*."""
    if _REFUSED & image.odd:
        return
    rng = random.Random(f"treat {seed}")
    before = _seen(image.path)
    if before["content"] != image.content:
        yield "cowhand reads other content than was drawn"
    treatments: dict[str, Callable[[Path], object]] = {
        "compact": lambda path: compact(path, format="qcow2"),
        "repair of leaks": lambda path: _tool(path, "check", "-r", "leaks"),
        "repair of all": lambda path: _tool(path, "check", "-r", "all"),
        "rehearsed compact": lambda path: compact(path, format="qcow2", dry_run=True),
    }
    for name, treat in treatments.items():
        folder = image.path.parent / name.replace(" ", "-")
        folder.mkdir()
        for file in image.path.parent.iterdir():
            if file.is_file() and file.suffix != ".raw":
                shutil.copy(file, folder)
        path = folder / "disk.qcow2"
        try:
            with chdir(folder):
                treat(path)
        except CowhandError as error:
            yield f"{name}: {error!r}"
            continue
        yield from (f"{name}: {what}" for what in _changed(image, path, before))
        if name == "rehearsed compact" and path.read_bytes() != image.path.read_bytes():
            yield f"{name}: it changed the file"
        if name.startswith("compact") and path.stat().st_size > image.path.stat().st_size:
            yield f"{name}: {image.path.stat().st_size} bytes became {path.stat().st_size}"
    yield from _converted(image, rng)


def _tool(path: Path, *words: str) -> None:
    outcome = run_own(["qemu-img", *words, "disk.qcow2"], path.parent)
    assert outcome.status == 0, outcome


def _seen(path: Path) -> dict[str, object]:
    """Return the disk's, the snapshots' and the bitmaps' content."""
    out: dict[str, object] = {}
    # The name of a data file is relative to where the process is, as in QEMU.
    with chdir(path.parent), cowhand.open(path, format="qcow2") as disk:
        out["content"] = disk.read(0, disk.size)
        for number, record in enumerate(getattr(disk.root, "snapshots", ())):
            with snapshots.open_snapshot(disk, record.id or record.name) as view:
                out[f"snapshot {number}"] = (record.id, record.name, record.vm_state_size, view.read(0, view.size))
        directory = getattr(disk.root, "bitmap_directory", ())
        for entry in directory:
            told = (entry.flags, entry.extra, entry.granularity_bits)
            usable = entry.live is not None and not entry.in_use
            out[f"bitmap {entry.text}"] = (*told, list(entry.live.bits.runs()) if usable else None)
    return out


def _changed(image: Image, path: Path, before: dict[str, object]) -> Iterator[str]:
    after = _seen(path)
    if set(after) != set(before):
        yield f"{set(after) ^ set(before)} came or went"
    yield from (f"{name} is not what it was" for name in before if after.get(name) != before[name])
    old, new = (kept_of(file.read_bytes()) for file in (image.path, path))
    old["features"] = new["features"] = None
    if old != new:
        yield f"the header is not what it was: {old} {new}"
    check = run_real(["qemu-img", "check", "disk.qcow2"], path.parent)
    if check.status not in ((0, 3) if "bitmap extra" not in image.odd else (0, 1, 3)) or (
        check.status == 3 and not _leaks_allowed(path, image)
    ):
        yield f"QEMU's check: {check}"


def _leaks_allowed(path: Path, image: Image) -> bool:
    return "rehearsed" in str(path)


def _converted(image: Image, rng: random.Random) -> Iterator[str]:
    folder = image.path.parent
    options = rng.choice(
        ([], ["-c"], ["-o", "cluster_size=4k"], ["-o", "extended_l2=on"], ["-W", "-m", "3"], ["-S", "0"], ["-S", "4k"])
    )
    done = run_own(["qemu-img", "convert", "-O", "qcow2", *options, "disk.qcow2", "new.qcow2"], folder)
    if done.status:
        if not {"bitmap extra"} & image.odd:
            yield f"convert: {done}"
        return
    run_real(["qemu-img", "convert", "-O", "raw", "new.qcow2", "new.raw"], folder)
    found = (folder / "new.raw").read_bytes()
    if found.rstrip(b"\0") != image.content[: len(image.content) - len(image.content) % 512].rstrip(b"\0"):
        yield f"convert {options}: other content"

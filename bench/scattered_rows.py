"""Rows for disks whose data lies about, as guests leave it that have written here and there for years: no cluster lies behind its neighbour.

Half of the disk is data, so that neither a table nor a copy has long runs.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from bulk_rows import Bulk
from inputs import MIB, Inputs
from measuring import Case, spawn

import cowhand
from cowhand.image.create import create

CLUSTER = 65536


def scattered(path: Path, size: int, *, base: Path | None = None) -> Path:
    """Make a disk of *size* bytes, half of whose clusters were written in any order."""
    if base is None:
        create(path, "qcow2", size, {})
    else:
        create(path, "qcow2", size, {}, backing=base.name, backing_format="qcow2")
    chance = random.Random(5)
    block = chance.randbytes(MIB)
    clusters = list(range(size // CLUSTER))
    chance.shuffle(clusters)
    with cowhand.open(path, format="qcow2", writable=True) as disk:
        for number in clusters[::2]:
            at = number % 15 * CLUSTER
            disk.write(number * CLUSTER, block[at : at + CLUSTER])
    return path


def cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the rows."""
    bulk = Bulk(inputs)
    size = 2 * inputs.data
    image = str(scattered(inputs.path("scattered.qcow2"), size))
    for target in ("qcow2", "raw"):
        options = ["-f", "qcow2", "-O", target, image]
        yield bulk.case(f"convert scattered qcow2 → {target}", 0.8, options, options)
    same = ("-f", "qcow2", "-F", "qcow2", image, image)
    yield Case(
        "compare scattered disks", "qemu-img compare", 0.6,
        lambda: spawn(bulk.cowhand, "compare", "--quiet", *same), lambda: spawn(bulk.qemu_img, "compare", "-q", *same),
    )  # fmt: skip
    yield _commit(bulk, inputs, inputs.data)


def _commit(bulk: Bulk, inputs: Inputs, size: int) -> Case:
    """An overlay with half of the disk, all over, goes down into a base that has all of it."""
    folder = inputs.path("lower")
    folder.mkdir()
    kept = inputs.filled(size)
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    overlay = scattered(kept.with_name("overlay.qcow2"), size, base=kept)

    def prepare() -> None:
        bulk.clear()
        shutil.copyfile(kept, base)
        shutil.copyfile(overlay, top)
        spawn(bulk.qemu_img, "rebase", "-u", "-b", base.name, "-F", "qcow2", top)
        for path in (base, top):
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    return Case(
        "commit of a scattered overlay", "qemu-img commit", 0.7,
        lambda: spawn(bulk.cowhand, "commit", "--quiet", "--force", "-f", "qcow2", top),
        lambda: spawn(bulk.qemu_img, "commit", "-q", "-f", "qcow2", top),
        prepare,
    )  # fmt: skip

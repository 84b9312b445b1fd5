"""Rows for images with extended L2 entries: the same work as on plain ones, with clusters of 128 KiB, whose subclusters are 4 KiB."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bulk_rows import Bulk
from inputs import Inputs
from measuring import Case, program, spawn
from random_rows import BLOCK, Requests

CLUSTER = 128 << 10
OPTIONS = "extended_l2=on,cluster_size=128k"
_PEER = "qemu-img bench -d 64"
_WORDS = "extended L2: "


def cases(inputs: Inputs, size: int, count: int) -> Iterator[Case]:
    """Yield the rows; those of small requests on images of *size* bytes with *count* requests."""
    yield from _bulk(inputs)
    yield from _tables(inputs)
    yield from _requests(inputs, size, count)


def _bulk(inputs: Inputs) -> Iterator[Case]:
    bulk = Bulk(inputs)
    into = ["-f", "raw", "-O", "qcow2", "-o", OPTIONS, str(inputs.sparse_raw())]
    yield bulk.case(f"{_WORDS}convert raw → qcow2", 0.75, into, into)
    image = str(inputs.qcow2("extended.qcow2", "-o", OPTIONS))
    out = ["-f", "qcow2", "-O", "raw", image]
    yield bulk.case(f"{_WORDS}convert qcow2 → raw", 0.75, out, out)
    both = ["-f", "qcow2", "-O", "qcow2", "-o", OPTIONS, image]
    yield bulk.case(f"{_WORDS}convert qcow2 → qcow2", 0.75, both, both)


def _tables(inputs: Inputs) -> Iterator[Case]:
    ours, peer, image = program("cowhand"), program("qemu-img"), str(mapped(inputs))
    size = inputs.mapped_size
    for name, goal, words, theirs in (
        (f"check, {size} mapped", 0.35, ("check", "--quiet"), ("check", "-q")),
        (f"map --output json, {size} mapped", 0.4, ("map", "--output", "json"), ("map", "--output", "json")),
    ):
        yield _case(name, f"qemu-img {words[0]}", goal, (ours, *words, image), (peer, *theirs, image))


def _case(name: str, peer_name: str, goal: float, ours: tuple[str, ...], peer: tuple[str, ...]) -> Case:
    return Case(_WORDS + name, peer_name, goal, lambda: spawn(*ours), lambda: spawn(*peer))


def _requests(inputs: Inputs, size: int, count: int) -> Iterator[Case]:
    filled = inputs.filled(size, "-o", OPTIONS)
    for name, goal, write in (
        ("random 4 KiB reads, submit(64)", 0.5, False),
        ("random 4 KiB writes in place", 0.5, True),
    ):
        requests = Requests(size, BLOCK, count, write=write)
        yield Case(_WORDS + name, _PEER, goal, requests.ours(lambda: filled), requests.peer(lambda: filled))
    image = inputs.path("allocating.qcow2")

    for name, reach, unit in (
        ("first writes to clusters", 2 * size, CLUSTER),
        ("first writes to subclusters", size // 16, BLOCK),
    ):
        # Every cluster once, or every subcluster; qemu-img bench takes no steps of 2 GiB and more.
        requests = Requests(reach, unit, 2 * size // CLUSTER, write=True)
        prepare = partial(_renew, inputs, image, reach)
        # QEMU puts nothing around these either: a loop of the system calls alone takes 0.6 of its time.
        yield Case(_WORDS + name, _PEER, 0.75, requests.ours(lambda: image), requests.peer(lambda: image), prepare)


def _renew(inputs: Inputs, image: Path, size: int) -> None:
    image.unlink(missing_ok=True)
    spawn(inputs.qemu_img, "create", "-q", "-f", "qcow2", "-o", OPTIONS, image, str(size))


def mapped(inputs: Inputs) -> Path:
    """Return a disk whose every subcluster is said to hold data, which are a hole of the file."""
    path = inputs.path("mapped-extended.qcow2")
    if path.exists():
        return path
    options = ("-o", f"{OPTIONS},preallocation=metadata")
    spawn(inputs.qemu_img, "create", "-q", "-f", "qcow2", *options, path, inputs.mapped_size)
    with open(path, "r+b") as file:
        file.seek(36)
        entries, offset = struct.unpack(">IQ", file.read(12))
        file.seek(offset)
        for (entry,) in struct.iter_unpack(">Q", file.read(8 * entries)):
            host = entry & 0x00FFFFFFFFFFFE00
            file.seek(host)
            table = bytearray(file.read(CLUSTER))
            for byte in range(12, 16):
                table[byte::16] = b"\xff" * (CLUSTER // 16)
            file.seek(host)
            file.write(table)
    return path

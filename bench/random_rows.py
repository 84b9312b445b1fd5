"""Rows for small requests in process: Disk.submit with 64 requests at once against qemu-img bench with a depth of 64.

Both walk the same offsets: steps of an odd number of blocks round the disk, which lands everywhere before it lands anywhere twice. What
qemu-img prints is the time of its requests alone, so ours leaves opening out as well.
"""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time

from inputs import MIB, Inputs
from measuring import Case, ProgramFailed, Sample, program, spawn

import cowhand
from cowhand.block.node.node import READ, WRITE_REQUEST

BLOCK = 4096
CLUSTER = 65536
DEPTH = 64
PATTERN = 0x5A


def offsets(size: int, unit: int, count: int) -> Iterator[int]:
    """Yield *count* offsets as qemu-img bench makes them with a step of :func:`step`."""
    position = 0
    for _ in range(count):
        yield position
        position = (position + step(size, unit)) % size


def step(size: int, unit: int) -> int:
    """Return an odd number of units near 0.618 of the disk."""
    return (int(size // unit * 0.618) | 1) * unit


class Requests:
    """One kind of load on images of one size."""

    def __init__(self, size: int, unit: int, count: int, *, write: bool, flush: bool = False) -> None:
        self.size = size
        self.unit = unit
        self.count = count
        self.write = write
        self.flush = flush

    def ours(self, image: Callable[[], Path]) -> Callable[[], Sample]:
        """Return our side."""

        def run() -> Sample:
            data = bytes([PATTERN]) * BLOCK
            kind = WRITE_REQUEST if self.write else READ
            buffers = [data if self.write else bytearray(BLOCK) for _ in range(DEPTH)]
            todo = list(offsets(self.size, self.unit, self.count))
            with cowhand.open(image(), format="qcow2", writable=self.write) as disk:
                begin, cpu = perf_counter(), process_time()
                for first in range(0, self.count, DEPTH):
                    batch = [
                        (kind, offset, buffer)
                        for offset, buffer in zip(todo[first : first + DEPTH], buffers, strict=False)
                    ]
                    disk.submit(batch)
                    if self.flush:
                        disk.flush()
                return Sample(perf_counter() - begin, process_time() - cpu)

        return run

    def peer(self, image: Callable[[], Path], aio: str = "threads", tool: str = "qemu-img") -> Callable[[], Sample]:
        """Return qemu-img bench's side, or with *tool* that of the command of ours that takes its arguments."""
        command = [
            program(tool),
            "bench",
            "-f",
            "qcow2",
            "-c",
            str(self.count),
            "-d",
            str(DEPTH),
            "-s",
            str(BLOCK),
        ]
        command += ["-S", str(step(self.size, self.unit)), "-i", aio]
        if self.write:
            command += ["-w", f"--pattern={PATTERN}"]
        if self.flush:
            command.append(f"--flush-interval={DEPTH}")

        def run() -> Sample:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([*command, str(image())], capture_output=True, text=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
            if done.returncode or found is None:
                raise ProgramFailed(f"{' '.join(command)}: {done.stderr.strip()}")
            # The whole process's, so with opening.
            return Sample(float(found[1]), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

        return run


def has_io_uring(image: Path) -> bool:
    """Tell whether this machine lets qemu-img use io_uring."""
    try:
        Requests(MIB, BLOCK, 1, write=False).peer(lambda: image, "io_uring")()
    except ProgramFailed:
        return False
    return True


def cases(inputs: Inputs, size: int, count: int) -> Iterator[Case]:
    """Yield the rows on images of *size* bytes with *count* requests."""
    filled = inputs.filled(size)
    reads = Requests(size, BLOCK, count, write=False)
    name = "qemu-img bench -d 64"
    yield Case("random 4 KiB reads, submit(64)", name, 0.5, reads.ours(lambda: filled), reads.peer(lambda: filled))
    if has_io_uring(filled):
        peer = reads.peer(lambda: filled, "io_uring")
        yield Case("the same", f"{name}, io_uring", 0.75, reads.ours(lambda: filled), peer)
    for requests, words in ((reads, "reads"), (Requests(size, BLOCK, count, write=True), "writes in place")):
        ours = requests.peer(lambda: filled, tool="cowhand-img")
        yield Case(f"cowhand-img bench, random 4 KiB {words}", name, 0.5, ours, requests.peer(lambda: filled))
    for goal, flush, words in ((0.5, False, ""), (0.75, True, ", a flush every 64")):
        writes = Requests(size, BLOCK, count // 4 if flush else count, write=True, flush=flush)
        yield Case(
            f"random 4 KiB writes in place{words}", name, goal, writes.ours(lambda: filled), writes.peer(lambda: filled)
        )
    for goal, flush, words in ((0.4, False, ""), (0.6, True, ", a flush every 64")):
        yield _allocating(inputs, size, goal, flush, f"first writes to clusters{words}", name, backed=False)
    yield _allocating(inputs, size, 1.0, False, "copy-on-write of 64 KiB", name, backed=True)


def _allocating(
    inputs: Inputs, size: int, goal: float, flush: bool, name: str, peer_name: str, *, backed: bool
) -> Case:
    image = inputs.path("allocating.qcow2")
    base = inputs.filled(size)

    def prepare() -> None:
        image.unlink(missing_ok=True)
        overlay = ("-b", base.name, "-F", "qcow2") if backed else ()
        spawn(inputs.qemu_img, "create", "-q", "-f", "qcow2", *overlay, image, str(size))

    writes = Requests(size, CLUSTER, size // CLUSTER, write=True, flush=flush)
    return Case(name, peer_name, goal, writes.ours(lambda: image), writes.peer(lambda: image), prepare)

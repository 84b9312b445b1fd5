"""Rows for NBD servers: ours against qemu-nbd and nbdkit, with fio and nbdcopy as clients, over a Unix socket.

QEMU's server and ours serve one qcow2 image, nbdkit the same content as a raw file. Seconds are those of fio's requests (or of
nbdcopy's process); processor time is the server's alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, perf_counter, sleep

from inputs import MIB, Inputs
from measuring import Case, ProgramFailed, Sample, program, spawn

_TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A server that runs from the first time that it is asked for until :meth:`stop`."""

    def __init__(self, words: Callable[[Path], list[str]], path: Path) -> None:
        self._words = words
        self.path = path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def start(self) -> int:
        """Start it, if that was not done; return its process."""
        if self._process is None:
            self.path.unlink(missing_ok=True)
            self._process = subprocess.Popen(self._words(self.path), stderr=subprocess.DEVNULL, start_new_session=True)
            deadline = monotonic() + 20
            while not self.path.exists():
                if self._process.poll() is not None or monotonic() > deadline:
                    raise ProgramFailed(f"{self._words(self.path)} does not serve")
                sleep(0.02)
            sleep(0.3)  # bound is not listening yet
        return self._process.pid

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()
            self._process = None

    def cpu(self) -> float:
        """Return the seconds of processors that it and its children have taken."""
        group = str(self.start())
        total = 0
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with (
                    contextlib.suppress(OSError),
                    open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as file,
                ):
                    fields = file.read().rpartition(")")[2].split()
                    if fields[2] == group:
                        total += int(fields[11]) + int(fields[12])
        return total / _TICKS


class Load:
    """What fio asks of a server."""

    def __init__(self, folder: Path, pattern: str, block: int, depth: int, count: int, *, clients: int = 1) -> None:
        self._folder = folder
        self._options = [
            f"rw={pattern}",
            f"bs={block}",
            f"iodepth={depth}",
            f"number_ios={count // clients}",
            f"numjobs={clients}",
        ]
        self._kind = "write" if "write" in pattern else "read"

    def on(self, server: Server) -> Callable[[], Sample]:
        """Return a side of a row."""

        def run() -> Sample:
            before = server.cpu()
            job = self._folder / "job.fio"
            common = [
                "[job]",
                "ioengine=nbd",
                f"uri={server.uri}",
                "group_reporting",
                "norandommap",
                "randseed=3",
                "thread",
            ]
            job.write_text("\n".join([*common, *self._options]) + "\n")
            done = subprocess.run([program("fio"), "--output-format=json", str(job)], capture_output=True, text=True)
            if done.returncode:
                raise ProgramFailed(f"fio: {done.stderr.strip() or done.stdout[-300:]}")
            told = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][self._kind]
            return Sample(told["runtime"] / 1000, server.cpu() - before)

        return run


def _copy(server: Server) -> Callable[[], Sample]:
    def run() -> Sample:
        before = server.cpu()
        begin = perf_counter()
        spawn(program("nbdcopy"), server.uri, "null:")
        return Sample(perf_counter() - begin, server.cpu() - before)

    return run


def cases(inputs: Inputs, size: int, count: int) -> Iterator[Case]:
    """Yield the rows on a disk of *size* bytes with about *count* small requests."""
    filled = inputs.filled(size)
    raw = inputs.path("nbd.raw")
    spawn(inputs.qemu_img, "convert", "-O", "raw", filled, raw)
    folder = inputs.folder
    options = ["-t", "-e", "0", "-f", "qcow2", str(filled)]

    def server(tool: str, name: str, *more: str) -> Server:
        return Server(lambda path: [program(tool), "-k", str(path), *more, *options], folder / f"{name}.sock")

    reading, qemu_reading = server("cowhand-nbd", "reading", "-r"), server("qemu-nbd", "qemu-reading", "-r")
    own, qemu = server("cowhand-nbd", "own"), server("qemu-nbd", "qemu")
    nbdkit = Server(lambda path: [program("nbdkit"), "-f", "-U", str(path), "file", str(raw)], folder / "nbdkit.sock")
    small, large = count // 2, max(64, size // MIB)
    servers = (own, reading, qemu, qemu_reading, nbdkit)
    reads: list[tuple[str, Load, float, float | None]] = [
        ("4 KiB random reads, depth 16", Load(folder, "randread", 4096, 16, count), 0.35, 0.8),
        (
            "4 KiB random reads, depth 16, 4 connections",
            Load(folder, "randread", 4096, 16, count, clients=4),
            0.25,
            0.9,
        ),
        ("4 KiB random reads, depth 1", Load(folder, "randread", 4096, 1, small), 0.5, None),
        ("1 MiB reads", Load(folder, "read", MIB, 4, large), 0.6, 0.6),
    ]
    writes: list[tuple[str, Load, float, float | None]] = [
        ("4 KiB random writes, depth 16", Load(folder, "randwrite", 4096, 16, count), 0.4, 1.0),
        ("4 KiB random writes, depth 1", Load(folder, "randwrite", 4096, 1, small), 0.8, None),
        ("1 MiB writes", Load(folder, "write", MIB, 4, large), 0.75, 0.75),
    ]
    try:
        yield Case("NBD, nbdcopy of a disk", "qemu-nbd", 0.8, _copy(reading), _copy(qemu_reading))
        for name, load, goal_qemu, goal_nbdkit in reads:
            yield Case(f"NBD, {name}", "qemu-nbd", goal_qemu, load.on(reading), load.on(qemu_reading))
            if goal_nbdkit is not None:
                yield Case(f"NBD, {name}", "nbdkit", goal_nbdkit, load.on(reading), load.on(nbdkit))
        yield from _far(options[-1], folder)
        reading.stop()
        qemu_reading.stop()
        for name, load, goal_qemu, goal_nbdkit in writes:
            # One image for both, which one at a time may write.
            yield Case(f"NBD, {name}", "qemu-nbd", goal_qemu, _alone(qemu, load.on(own)), _alone(own, load.on(qemu)))
            if goal_nbdkit is not None:
                yield Case(f"NBD, {name}", "nbdkit", goal_nbdkit, _alone(qemu, load.on(own)), load.on(nbdkit))
    finally:
        for each in servers:
            each.stop()


def _alone(other: Server, side: Callable[[], Sample]) -> Callable[[], Sample]:
    """Run *side* when *other*, which writes the same image, has ended."""

    def run() -> Sample:
        other.stop()
        return side()

    return run


def _far(image: str, folder: Path) -> Iterator[Case]:
    """Yield the row of an image on another machine, which answers after 5 ms."""
    delay = ["--filter=delay", "delay-read=5ms"]
    far = Server(
        lambda path: [program("nbdkit"), "-f", "-r", "-U", str(path), *delay, "file", image], folder / "far.sock"
    )
    words = ["-r", "-t", "-e", "0", "-f", "qcow2"]
    own = Server(lambda path: [program("cowhand-nbd"), "-k", str(path), *words, far.uri], folder / "far-own.sock")
    qemu = Server(lambda path: [program("qemu-nbd"), "-k", str(path), *words, far.uri], folder / "far-qemu.sock")
    load = Load(folder, "randread", 4096, 16, 2000)
    try:
        far.start()
        yield Case("NBD, 4 KiB random reads, depth 16, a backend of 5 ms", "qemu-nbd", 1.0, load.on(own), load.on(qemu))
    finally:
        for server in (own, qemu, far):
            server.stop()

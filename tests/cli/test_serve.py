"""``cowhand serve`` as a process: what it prints, what clients see, how it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowhand
from tests.cli.command import cowhand as run_cowhand

SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    cowhand.create(path, "qcow2", SIZE)
    with cowhand.open(path, writable=True) as disk:
        disk.write(0, random.Random(3).randbytes(1 << 20))
        cowhand.create_snapshot(disk, "monday")
        disk.write(0, b"tuesday")
    return path


@contextmanager
def serving(*words: str | Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run the command until the block is left; yields the process and the lines up to the hint, or the JSON's."""
    command = [sys.executable, "-m", "cowhand", "serve", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if "Ctrl-C" in line or line == "}\n":
                break
        else:
            pytest.fail("\n".join(lines))
        yield process, lines
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_what_is_printed_is_how_to_reach_it(image: Path, tmp_path: Path) -> None:
    with serving("-l", tmp_path / "s", "-l", "localhost:0", image) as (process, lines):
        assert lines[0] == f"disk.qcow2: {image} (qcow2), 4 MiB, read-only"
        uris = [line.strip() for line in lines[1:-1]]
        assert len(uris) >= 2
        for uri in uris:
            with cowhand.open(uri, format="raw") as disk:
                assert disk.read(0, 7) == b"tuesday"
        with pytest.raises(cowhand.CowhandError):
            cowhand.open(uris[0], format="raw", writable=True)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(20) in (0, 130)
        assert "connected" in said and "left: " in said and "Traceback" not in said
    assert not (tmp_path / "s").exists()


def test_writers_and_several_images(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))
    with serving("--output", "json", "-w", "-l", tmp_path / "s", image, other) as (_, lines):
        exports = json.loads("\n".join(lines))["exports"]
        assert [(each["name"], each["writable"], each["size"]) for each in exports] == [
            ("disk.qcow2", True, SIZE),
            ("other.raw", True, SIZE),
        ]
        with cowhand.open(exports[1]["uris"][0], format="raw", writable=True) as disk:
            disk.write(5, b"written", fua=True)
    assert other.read_bytes()[5:12] == b"written"


def test_a_snapshot_is_what_it_was(image: Path, tmp_path: Path) -> None:
    with serving("--snapshot", "monday", "--name", "old", "-l", tmp_path / "s", image) as (_, lines):
        disk = cowhand.open(lines[1].strip(), format="raw")
        assert disk.read(0, 1 << 20) == random.Random(3).randbytes(1 << 20)
        disk.close()


def test_once_it_ends_with_its_client(image: Path, tmp_path: Path) -> None:
    with serving("--once", "-l", tmp_path / "s", image) as (process, lines):
        cowhand.open(lines[1].strip(), format="raw").close()
        assert process.wait(20) == 0


def test_several_processes_share_the_clients(image: Path, tmp_path: Path) -> None:
    with serving("--processes", "2", "-l", tmp_path / "s", image) as (process, lines):
        deadline = time.monotonic() + 30
        while True:  # the other one takes a while to start
            disks = [cowhand.open(lines[1].strip(), format="raw") for _ in range(4)]
            holders = _holders(tmp_path / "s")
            for disk in disks:
                assert disk.read(0, 7) == b"tuesday"
                disk.close()
            if len(holders) == 2 or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        assert len(holders) == 2
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in holders - {process.pid}):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)


def _holders(path: Path) -> set[int]:
    """Return the processes that have connected sockets of *path*."""
    inodes = {
        words[6]
        for words in map(str.split, Path("/proc/net/unix").read_text().splitlines())
        if words[-1] == str(path) and words[5] == "03"
    }
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:[") and target[8:-1] in inodes:
            found.add(int(entry.parts[2]))
    return found


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["-l", "x:y:z", "{image}"], 1, "is not a port"),
        (["-l", "10809", "{image}"], 1, "localhost:10809"),
        (["--snapshot", "none", "-l", "{folder}/s", "{image}"], 1, "none"),
        (["-w", "--snapshot", "monday", "{image}"], 2, "cannot be written"),
        (["--name", "x", "{image}", "{image}"], 2, "one image"),
        (["--processes", "2", "-w", "{image}"], 2, "--writable"),
        (["--processes", "0", "{image}"], 2, "1 to"),
        (["--tls-verify-peer", "{image}"], 2, "--tls-certificates"),
        (["--bitmap", "none", "{image}"], 1, "none"),
        (["-l", "{folder}/no/such/folder", "{image}"], 3, "cannot listen"),
        (["{folder}/none"], 1, "none"),
    ],
)
def test_what_makes_no_sense(image: Path, tmp_path: Path, words: list[str], status: int, said: str) -> None:
    result = run_cowhand("serve", *(word.format(image=image, folder=tmp_path) for word in words), status=status)
    assert said in result.stderr

"""The NBD server and other programs as its clients: QEMU's tools, libnbd's, nbdkit, fio, and this project's own driver."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from tests.exports.serving import Running, served
from tests.tools.programs import find, require, run
from tests.tools.qemu import require_qemu

SIZE = 32 << 20
MIB = 1 << 20
#: libnbd's Python module belongs to the distribution's interpreter.
PYTHON = os.environ.get("COWHAND_SYSTEM_PYTHON", "/usr/bin/python3")
#: Requests of the load with verification, half of them writes: one round in the suite, a million for the long form.
LOAD = int(os.environ.get("COWHAND_NBD_LOAD", "16384"))

pytestmark = pytest.mark.interop
require_libnbd = require("nbdinfo")
require_fio = require("fio")
require_nbdkit = require("nbdkit")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk.qcow2"
    cowhand.create(path, "qcow2", SIZE)
    with cowhand.open(path, writable=True) as opened:
        rng = random.Random(2)
        for _ in range(40):
            opened.write(rng.randrange(SIZE - 70_000), rng.randbytes(rng.randrange(1, 70_000)))
        yield opened


@pytest.fixture
def server(disk: Disk, tmp_path: Path) -> Iterator[Running]:
    with served(disk, tmp_path / "s", name="", description="for peers", allocation_depth=True) as running:
        yield running


def content(disk: Disk) -> bytes:
    return disk.read(0, disk.size)


@require_libnbd
class TestLibnbd:
    """libnbd's programs."""

    def test_nbdinfo_tells_all(self, server: Running) -> None:
        [told] = run("nbdinfo", "--json", server.uri).json()["exports"]
        assert told["export-size"] == SIZE
        assert told["contexts"] == ["base:allocation", "qemu:allocation-depth"]
        assert told["description"] == "for peers"
        for name in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
            assert told[f"can_{name}"], name
        assert not told["is_read_only"]
        assert (told["block_size_minimum"], told["block_size_maximum"]) == (1, 32 << 20)

    def test_nbdinfo_lists(self, server: Running) -> None:
        assert [each["export-name"] for each in run("nbdinfo", "--list", "--json", server.uri).json()["exports"]] == [
            ""
        ]

    def test_its_map_is_that_of_the_disk(self, server: Running, disk: Disk) -> None:
        told = [
            (row["offset"], row["length"], row["type"]) for row in run("nbdinfo", "--map", "--json", server.uri).json()
        ]
        expected: list[tuple[int, int, int]] = []
        for batch in disk.extents():
            for row in batch:
                kind = (0 if row.flags & cowhand.DATA else 1) | (2 if row.flags & cowhand.ZERO else 0)
                if expected and expected[-1][2] == kind:
                    expected[-1] = (expected[-1][0], expected[-1][1] + row.length, kind)
                else:
                    expected.append((row.start, row.length, kind))
        assert told == expected

    def test_nbdcopy_both_ways(self, server: Running, disk: Disk, tmp_path: Path) -> None:
        out, new = tmp_path / "out", tmp_path / "new"
        run("nbdcopy", server.uri, out)
        assert out.read_bytes() == content(disk)
        data = bytearray(SIZE)
        data[5 * MIB : 9 * MIB] = random.Random(3).randbytes(4 * MIB)
        new.write_bytes(data)
        run("nbdcopy", new, server.uri)
        assert content(disk) == data

    def test_the_shell(self, server: Running, disk: Disk) -> None:
        if run(PYTHON, "-c", "import nbd", check=False).status:
            pytest.skip("libnbd's module for the system's Python is absent")
        script = SHELL.replace("URI", server.uri)
        result = run(PYTHON, "-c", script)
        assert result.stdout.split() == ["done"], result
        assert disk.read(100, 5) == b"hello"
        assert disk.read(65536, 4096) == bytes(4096)


SHELL = """
import nbd
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.add_meta_context("qemu:allocation-depth")
h.connect_uri("URI")
assert h.get_size() == 32 << 20 and h.get_structured_replies_negotiated()
h.pwrite(b"hello", 100, nbd.CMD_FLAG_FUA)
assert h.pread(5, 100) == b"hello"
pieces = []
h.pread_structured(3 << 20, 0, lambda data, offset, status, error: pieces.append(len(data)), nbd.CMD_FLAG_DF)
assert pieces == [3 << 20]
h.zero(4096, 65536)
h.zero(4096, 131072, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(65536, 131072, nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 262144, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
seen = {}
def extent(context, offset, entries, error):
    seen[context] = entries
h.block_status(32 << 20, 0, extent)
assert set(seen) == {"base:allocation", "qemu:allocation-depth"}
assert sum(seen["base:allocation"][::2]) == 32 << 20
h.block_status(32 << 20, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(seen["base:allocation"]) == 2
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data)))
h.pread_structured(20 << 20, 0, chunk)
assert sum(n for _, n in chunks) == 20 << 20
h.set_strict_mode(0)
for call in (lambda: h.pread(1, 32 << 20), lambda: h.pwrite(b"x", 32 << 20), lambda: h.trim(2, (32 << 20) - 1)):
    try:
        call()
        raise SystemExit("a request outside of the export was done")
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error
h.shutdown()
print("done")
"""


@require_qemu
class TestQemu:
    """QEMU's tools."""

    def test_images_are_the_same_through_it(self, server: Running, tmp_path: Path) -> None:
        copy = tmp_path / "copy.raw"
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, copy)
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, server.uri).stdout

    def test_qemu_writes_and_the_disk_has_it(self, server: Running, disk: Disk) -> None:
        words = [
            "write -P 1 0 1M",
            "write -f -P 2 5M 3M",
            "write -z -u 100k 200k",
            "write -z 20M 1M",
            "discard 6M 64k",
            "flush",
        ]
        run("qemu-io", "-f", "raw", *[part for word in words for part in ("-c", word)], server.uri)
        assert disk.read(0, 100 << 10) == bytes([1]) * (100 << 10)
        assert disk.read(100 << 10, 200 << 10) == bytes(200 << 10)
        assert disk.read(7 * MIB, MIB) == bytes([2]) * MIB
        assert disk.read(20 * MIB, MIB) == bytes(MIB)

    def test_the_depth_of_allocation(self, server: Running) -> None:
        opts = f"driver=nbd,server.type=unix,server.path={server.path},x-dirty-bitmap=qemu:allocation-depth"
        rows = run("qemu-img", "map", "--output=json", "--image-opts", opts).json()
        assert {row["data"] for row in rows} == {True, False}

    def test_a_qcow2_image_inside_of_an_export(self, server: Running, disk: Disk) -> None:
        run("qemu-img", "create", "-q", "-f", "qcow2", server.uri, "20M")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 2M", "-c", "write -P 8 7M 64k", server.uri)
        assert run("qemu-img", "check", "-f", "qcow2", server.uri).status == 0
        with cowhand.open(
            {"driver": "qcow2", "file": {"driver": "nbd", "server": {"type": "unix", "path": str(server.path)}}}
        ) as own:
            assert own.read(1 * MIB, 2 * MIB) == bytes([9]) * (2 * MIB)


@require_fio
@pytest.mark.parametrize("pattern", ["randwrite", "write"])
def test_load_with_verification_over_four_connections(server: Running, tmp_path: Path, pattern: str) -> None:
    each = 8 * MIB
    jobs = tmp_path / "load.fio"
    lines = [
        "[global]", "ioengine=nbd", f"uri={server.uri}", f"rw={pattern}", "bs=4k", "iodepth=16", f"size={each}",
        f"loops={max(1, LOAD // 16384)}", "verify=crc32c", "verify_fatal=1", "verify_state_save=0", "randseed=7", "fsync=100",
    ]  # fmt: skip
    for number in range(4):
        lines += [f"[job{number}]", f"offset={number * each}"]
    jobs.write_text("\n".join(lines) + "\n")
    result = run("fio", "--output-format=json", jobs, timeout=max(100, LOAD // 100))
    told = json.loads(result.stdout[result.stdout.index("{") :])
    assert [job["error"] for job in told["jobs"]] == [0] * 4
    assert len(server.seen.began) >= 4


@require_nbdkit
@require_libnbd
def test_nbdkit_before_it(server: Running, disk: Disk, tmp_path: Path) -> None:
    out = tmp_path / "out"
    front = tmp_path / "front"
    command = ["nbdkit", "-U", front, "nbd", f"socket={server.path}", "--filter=delay", "rdelay=1ms", "--filter=retry"]
    if find("nbdkit") is None:
        pytest.skip("nbdkit is absent")
    run(*command, "--run", f"nbdcopy 'nbd+unix:///?socket={front}' {out}")
    assert out.read_bytes() == content(disk)


def test_the_driver_of_this_project_with_a_model(server: Running, disk: Disk) -> None:
    rng = random.Random(11)
    model = bytearray(content(disk))
    with cowhand.open(server.uri, format="raw", writable=True) as own:
        for _ in range(300):
            length = rng.choice([1, 512, 4096, 65536, 3 * MIB])
            offset = rng.randrange(SIZE - length)
            kind = rng.randrange(4)
            if kind == 0:
                data = rng.randbytes(length)
                own.write(offset, data, fua=rng.random() < 0.2)
                model[offset : offset + length] = data
            elif kind == 1:
                own.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            elif kind == 2:
                assert own.read(offset, length) == model[offset : offset + length]
            else:
                own.flush()
        assert own.read(0, SIZE) == model
    assert content(disk) == model


def test_a_chain_over_it_reads_as_the_disk(server: Running, disk: Disk, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    cowhand.create(top, "qcow2", backing=server.uri, backing_format="raw")
    with cowhand.open(top, writable=True) as over:
        over.write(77, b"over")
        assert over.read(0, SIZE)[:200] == content(disk)[:77] + b"over" + content(disk)[81:200]
    assert sys.getswitchinterval() <= 0.001

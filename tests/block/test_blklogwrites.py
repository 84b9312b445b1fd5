"""blklogwrites: the log is QEMU's byte for byte, and tells what a crash leaves of a qcow2 image."""

from __future__ import annotations

import io
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.drivers import REGISTRY
from cowhand.testing import logwrites, replay
from cowhand.testing.filters import FilterContract
from tests.block.disks import qcow2_file, qcow2_node
from tests.tools.programs import find
from tests.tools.qemu import require_qemu

MIB = 1 << 20


def over(inner: BlockNode, log: BlockNode, **options: Any) -> BlockNode:
    given = {"driver": "blklogwrites", "file": inner, "log": log, "read-only": not inner.writable, **options}
    return Opening(REGISTRY).open(given)


class TestBlkLogWritesContract(FilterContract):
    """The filter changes nothing."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        return over(inner, MemoryNode())


def test_the_log_is_as_the_kernel_has_it() -> None:
    log = MemoryNode()
    with Disk(log):
        with Disk(over(MemoryNode(content=bytes(MIB)), log), writable=True) as disk:
            disk.write(4096, b"w" * 1024)
            disk.flush()
            disk.discard(8192, 4096)
            disk.write(0, b"f" * 512, fua=True)
        raw = log.snapshot_bytes()
        assert struct.unpack_from("<QQQI", raw) == (0x6A736677736872, 1, 5, 512)
        assert struct.unpack_from("<QQQQ", raw, 512) == (8, 2, 0, 0)
        assert raw[1024:2048] == b"w" * 1024
        assert struct.unpack_from("<QQQQ", raw, 2048) == (0, 0, 1, 0)
        assert struct.unpack_from("<QQQQ", raw, 2560) == (16, 8, 4, 0)
        assert struct.unpack_from("<QQQQ", raw, 3072) == (0, 1, 2, 0)
        with Disk(over(MemoryNode(content=bytes(MIB)), log, **{"log-append": True}), writable=True) as disk:
            disk.write(512, b"m" * 512)
        assert [entry.offset for entry in logwrites.entries(io.BytesIO(log.snapshot_bytes()))][-2:] == [512, 0]


@pytest.mark.interop
@require_qemu
def test_the_log_is_that_of_qemu(tmp_path: Path) -> None:
    for name in ("real", "own"):
        (tmp_path / f"{name}.img").write_bytes(bytes(MIB))
        (tmp_path / f"{name}.log").write_bytes(b"")
    program = find("qemu-io")
    assert program is not None
    where = f"driver=blklogwrites,file.filename={tmp_path}/real.img,file.driver=file,log.filename={tmp_path}/real.log"
    commands = ("write -P 65 4k 8k", "write -P 66 0 512", "flush", "write -z 64k 4k", "discard 128k 64k", "flush")
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run([program, *words, "--image-opts", where], check=True, capture_output=True)
    import cowhand

    given = {"driver": "blklogwrites", "file": {"driver": "file", "filename": f"{tmp_path}/own.img"}}
    with cowhand.open({**given, "log": {"driver": "file", "filename": f"{tmp_path}/own.log"}}, writable=True) as disk:
        disk.write(4096, b"A" * 8192)
        disk.write(0, b"B" * 512)
        disk.flush()
        disk.write_zeroes(65536, 4096)
        disk.discard(131072, 65536)
        disk.flush()
    found = {}
    for name in ("real", "own"):
        with (tmp_path / f"{name}.log").open("rb") as file:
            read = list(logwrites.entries(file))
        # How often a flush is repeated, with nothing in between, is no matter of the log.
        found[name] = [entry for index, entry in enumerate(read) if index == 0 or entry != read[index - 1]]
    assert found["own"] == found["real"]


def test_a_log_says_what_a_crash_leaves_of_an_image() -> None:
    initial = qcow2_file(4 * MIB)
    log = MemoryNode()
    flushed: dict[int, bytes] = {}
    rng = random.Random(3)
    with Disk(log):
        file = over(initial.copy(), log)
        with Disk(qcow2_node(file), writable=True) as disk:
            for round_ in range(6):
                for _ in range(4):
                    disk.write(rng.randrange(64) * 65536, bytes([round_ + 1]) * 4096)
                disk.discard(rng.randrange(64) * 65536, 65536)
                disk.flush()
            for place in range(8):
                disk.write(place * 65536, b"F" * 512)
                flushed[place * 65536] = b"F" * 512
            disk.flush()
        raw = log.snapshot_bytes()
    medium = initial.copy()
    medium.resize(-(-medium.size // 512) * 512)
    read = logwrites.read_log(io.BytesIO(raw), medium)

    def check(state: replay.CrashState) -> None:
        node = qcow2_node(state.image, writable=False)
        result = node.check(None, lambda line: None)
        assert not result.corruptions, state.story
        with Disk(node) as disk:
            if state.moment > read.flushes[-1].end:
                for place, content in flushed.items():
                    assert disk.read(place, 512) == content

    assert replay.replay(replay.crash_states(read, samples=60, single_limit=30), check) > 100


@pytest.mark.parametrize("raw", [b"", b"\0" * 512, struct.pack("<QQQI", 0x6A736677736872, 1, 1 << 60, 512),
                                 struct.pack("<QQQI", 0x6A736677736872, 1, 3, 7)])  # fmt: skip
def test_what_is_no_log_is_refused(raw: bytes) -> None:
    with pytest.raises(CowhandError):
        list(logwrites.entries(io.BytesIO(raw)))
    if raw:
        with pytest.raises(CowhandError):
            over(MemoryNode(content=bytes(512)), MemoryNode(content=raw), **{"log-append": True})

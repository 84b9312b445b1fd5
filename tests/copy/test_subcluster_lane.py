"""The fast lane into images with extended L2 entries: what is left out of a cluster, what was there before, and who else has the cluster."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.format_io.reservations import Kind
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.node.node import WRITE_REQUEST
from cowhand.block.protocols.memory import MemoryNode
from cowhand.copy.engine import sink as sinks
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import NoSpace
from cowhand.crypto import secrets
from cowhand.image.create import create
from cowhand.image.snapshots import create_snapshot
from cowhand.jobs.commit import commit
from cowhand.jobs.rebase import rebase
from cowhand.testing.faults import FaultNode
from tests.block.disks import qcow2_file, qcow2_node
from tests.block.test_batch import sound_content
from tests.copy.images import MIB, content, read_all, sparse_file
from tests.tools.qemu import assert_clean, assert_identical, qemu_img, qemu_map, require_qemu

CLUSTER = 16384
SUB = CLUSTER // 32
OPTIONS = {"extended_l2": "on", "cluster_size": "16k"}


def scattered(rng: random.Random, size: int) -> bytes:
    """Return a disk of stretches of data and zeroes of every length, mostly of a few sectors."""
    out = bytearray()
    while len(out) < size:
        length = rng.choice((512, 1024, 4096, 4096, 20_480, 100_000))
        out += rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
    return bytes(out[:size])


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("sparse", ["512", "4k", "64k"])
@pytest.mark.parametrize("cluster", ["16k", "128k"])
def test_zeroes_in_clusters_are_left_out_as_qemu_does(sparse: str, cluster: str, tmp_path: Path) -> None:
    size = 3 * MIB + 7 * 512
    raw = sparse_file(tmp_path / "raw", scattered(random.Random(f"{sparse} {cluster}"), size))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = {**OPTIONS, "cluster_size": cluster}
    convert(raw, ours, "qcow2", source_format="raw", options=options, sparse_size=sparse)
    words = ",".join(f"{name}={value}" for name, value in options.items())
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", words, "-S", sparse, raw, theirs)
    assert_identical(ours, "qcow2", raw, "raw")
    assert_clean(ours)
    stored = [
        [(row["start"], row["length"], row["data"], row["zero"]) for row in qemu_map(path, "qcow2")]
        for path in (ours, theirs)
    ]
    assert stored[0] == stored[1]
    assert ours.stat().st_blocks <= theirs.stat().st_blocks + 8


@pytest.mark.parametrize("seed", range(10))
def test_over_everything_that_an_existing_image_can_hold(seed: int, tmp_path: Path) -> None:
    """Subclusters of each kind, clusters of a snapshot, compressed ones, a backing file; the source is shorter, or as long."""
    rng = random.Random(seed)
    size = 2 * MIB
    base, target = tmp_path / "base.raw", tmp_path / "target.qcow2"
    base.write_bytes(rng.randbytes(size - rng.randrange(3) * 300 * 512))
    backing = {"backing": str(base), "backing_format": "raw"} if seed % 2 else {}
    create(target, "qcow2", size, OPTIONS, **backing)  # type: ignore[arg-type]
    with cowhand.open(target, writable=True) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        packed = node.codec.compress(b"pack" * (CLUSTER // 4))
        assert packed is not None
        for turn in range(120):
            at = rng.randrange(size // 512 - 100) * 512
            length = rng.choice((512, 512, 1536, 4096, 40_000))
            if turn == 70:
                create_snapshot(disk, "kept")
                kept = disk.read(0, size)
            choice = rng.random()
            if choice < 0.5:
                disk.write(at, rng.randbytes(length))
            elif choice < 0.8:
                disk.write_zeroes(at, length, unmap=rng.random() < 0.5)
            elif not any(row.flags for row in node.map_batch(at - at % CLUSTER, CLUSTER)):
                node.write_compressed(at - at % CLUSTER, packed)
        old = disk.read(0, size)
    new = scattered(rng, size - rng.choice((0, 5000 * 512 // 7, 100 * 512)) // 512 * 512)
    source = sparse_file(tmp_path / "source.raw", new)
    convert(source, target, "qcow2", source_format="raw", skip_create=True, in_order=bool(seed % 3))
    assert_clean(target)
    with cowhand.open(target) as disk:
        assert read_all(disk) == new + old[len(new) :]
    convert(target, tmp_path / "kept.raw", "raw", snapshot="kept")
    assert (tmp_path / "kept.raw").read_bytes() == kept


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("raw_data", [False, True])
def test_into_a_data_file(raw_data: bool, tmp_path: Path) -> None:
    rng = random.Random(raw_data)
    first, second = scattered(rng, 2 * MIB + 512), scattered(rng, 2 * MIB + 512)
    target, data = tmp_path / "target.qcow2", tmp_path / "data"
    data.write_bytes(b"what was there before" * 100_000)
    options = {**OPTIONS, "data_file": str(data), "data_file_raw": "on" if raw_data else "off"}
    for number, content_ in enumerate((first, second)):
        source = sparse_file(tmp_path / f"{number}.raw", content_)
        convert(
            source,
            target,
            "qcow2",
            source_format="raw",
            options={} if number else options,
            skip_create=number > 0,
            overwrite=True,
        )
        assert_clean(target)
        assert_identical(target, "qcow2", source, "raw")
        if raw_data:
            assert data.read_bytes()[: len(content_)] == content_


def test_into_an_encrypted_image(tmp_path: Path) -> None:
    first, second = scattered(random.Random(5), MIB), scattered(random.Random(6), MIB)
    target = tmp_path / "target.qcow2"
    with secrets.given({"s0": b"a passphrase"}):
        encrypt = {"encrypt.format": "luks", "encrypt.key-secret": "s0", "encrypt.iter-time": 1}
        create(target, "qcow2", MIB, {**OPTIONS, **encrypt})
        for number, data in enumerate((first, second)):
            source = sparse_file(tmp_path / f"{number}.raw", data)
            described = {"driver": "qcow2", "encrypt.key-secret": "s0", "file.filename": str(target)}
            with cowhand.open(described, writable=True) as disk:
                convert(source, disk, source_format="raw")
            with cowhand.open(described) as disk:
                assert read_all(disk) == data
    assert first[:4096] not in target.read_bytes()


def test_pieces_at_the_odd_end_of_a_disk_that_grows_again() -> None:
    """The last subcluster is cut by the end of the disk, and lies over a backing file that is longer: nothing of that shows when the disk grows."""
    sub = 2048
    file = qcow2_file(MIB + 3 * sub + 512, cluster_size=32 * sub, extended_l2=True)
    keeper = Disk(file)
    with Disk(qcow2_node(file, backing=MemoryNode(content=b"b" * 2 * MIB)), writable=True) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        length = disk.size - MIB
        buffer = bytearray(b"n" * length)
        buffer[sub : 2 * sub] = bytes(sub)
        sink = sinks.LaneSink(disk, node, sparse=512, reads_zero=False)
        with sink.hold():
            sink.store(MIB, buffer, sink.place(MIB, buffer, length, sink.prepare(MIB, buffer, length)))
        disk.submit([(WRITE_REQUEST, MIB - 100, b"x" * 50), (WRITE_REQUEST, disk.size - 10, b"y" * 10)])
        expected = b"b" * 50 + b"x" * 50 + b"b" * 50 + bytes(buffer[:-10]) + b"y" * 10
        before = disk.size
        assert disk.read(MIB - 150, 150 + length) == expected
        disk.resize(2 * MIB)
        assert disk.read(MIB - 150, 150 + length) == expected
        assert disk.read(before, MIB // 2) == bytes(MIB // 2)
    keeper.close()


@require_qemu
@pytest.mark.interop
def test_an_overlay_gets_only_the_subclusters_that_are_its_sources_own(tmp_path: Path) -> None:
    rng = random.Random(1)
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(rng.randbytes(2 * MIB))
    create(top, "qcow2", 2 * MIB, OPTIONS, backing=str(base), backing_format="raw")
    with cowhand.open(top, writable=True) as disk:
        for _ in range(60):
            disk.write(rng.randrange(2 * MIB // SUB - 3) * SUB, rng.randbytes(SUB * rng.randrange(1, 4)))
            disk.write_zeroes(rng.randrange(2 * MIB // SUB) * SUB, SUB)
        expected = read_all(disk)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    convert(top, ours, "qcow2", options=OPTIONS, backing=str(base), backing_format="raw")
    words = "extended_l2=on,cluster_size=16k"
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", "-B", base, "-F", "raw", "-o", words, top, theirs)
    maps = [
        [(row["start"], row["length"], row["depth"], row["zero"]) for row in qemu_map(path, "qcow2")]
        for path in (ours, theirs)
    ]
    assert maps[0] == maps[1]
    assert_clean(ours)
    with cowhand.open(ours) as disk:
        assert read_all(disk) == expected


def test_a_rebase_takes_only_the_subclusters_that_differ(tmp_path: Path) -> None:
    rng = random.Random(2)
    old, new, top = tmp_path / "old.raw", tmp_path / "new.raw", tmp_path / "top.qcow2"
    data = rng.randbytes(MIB)
    old.write_bytes(data)
    changed = bytearray(data)
    places = rng.sample(range(MIB // SUB), 40)
    for number in places:
        changed[number * SUB + 9] ^= 1
    new.write_bytes(changed)
    create(top, "qcow2", MIB, OPTIONS, backing=str(old), backing_format="raw")
    with cowhand.open(top, writable=True) as disk:
        disk.write(places[0] * SUB, b"own" * 100)
        expected = read_all(disk)
    result = rebase(top, str(new), "raw")
    assert result.copied <= 40 * SUB
    with cowhand.open(top) as disk:
        assert read_all(disk) == expected
        own = sum(row.length for batch in disk.extents(depth=1) for row in batch if row.flags & 1)
    assert own <= 40 * SUB
    assert_clean(top)


@pytest.mark.parametrize("nth", [1, 2, 4, 6])
def test_a_full_target_leaves_nothing_taken(nth: int) -> None:
    """Of a piece with several reservations one fails: all of them are taken back, and what was there reads as before."""
    file = qcow2_file(MIB, cluster_size=CLUSTER, extended_l2=True)
    keeper = Disk(file)
    fault = FaultNode(file)
    with Disk(qcow2_node(fault), writable=True) as disk:
        for number in range(3, 32, 5):
            disk.write(number * CLUSTER + 5 * SUB, b"o" * SUB)
        before = disk.read(0, MIB)
        node = disk.root
        assert isinstance(node, Qcow2Node)
        sink = sinks.LaneSink(disk, node, sparse=512, reads_zero=False)
        buffer = bytearray(scattered(random.Random(nth), MIB))
        fault.fail("write", nth, errno.ENOSPC)
        with sink.hold(), pytest.raises(NoSpace):
            sink.store(0, buffer, sink.place_parts(0, sink.prepare(0, buffer, MIB)))
        shown = disk.read(0, MIB)
        assert all(
            shown[at : at + SUB] in (before[at : at + SUB], bytes(buffer[at : at + SUB])) for at in range(0, MIB, SUB)
        )
        assert node._reserved == []
        with sink.hold():
            sink.store(0, buffer, sink.place(0, buffer, MIB, sink.prepare(0, buffer, MIB)))
        assert disk.read(0, MIB) == buffer
    keeper.close()
    assert sound_content(file) == buffer


def test_what_a_reservation_cannot_leave_out() -> None:
    """Data that moves with its cluster, a part of a subcluster, a compressed cluster; and what is left out keeps what it said."""
    file = qcow2_file(MIB, cluster_size=CLUSTER, extended_l2=True)
    keeper = Disk(file)
    with Disk(qcow2_node(file, backing=MemoryNode(content=b"b" * MIB)), writable=True) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        disk.write_zeroes(2 * SUB, SUB)
        disk.write(CLUSTER + 3 * SUB, b"d" * SUB)
        create_snapshot(disk, "shared")
        reservation = node.claim(0, 2 * CLUSTER, Kind.DATA)
        assert reservation is not None
        assert (reservation.begin, reservation.end) == (0, 2 * CLUSTER)
        assert node.spare(reservation, SUB, 5 * SUB)
        assert not node.spare(reservation, 6 * SUB + 512 // 2, 9 * SUB)
        assert not node.spare(reservation, CLUSTER + 2 * SUB, CLUSTER + 5 * SUB)
        assert node.spare(reservation, CLUSTER + 20 * SUB, 2 * CLUSTER)
        assert reservation.end == CLUSTER + 20 * SUB
        node.put(reservation, 0, [memoryview(b"n" * (CLUSTER + 20 * SUB))], CLUSTER + 20 * SUB)
        node.finish(reservation)
        shown = disk.read(0, 2 * CLUSTER)
        model = b"n" * SUB + b"b" * SUB + bytes(SUB) + b"b" * 2 * SUB + b"n" * (CLUSTER + 15 * SUB) + b"b" * 12 * SUB
        assert shown == model
    keeper.close()
    sound_content(file, b"b" * MIB)


@pytest.mark.parametrize("held", ["snapshot", "compressed"])
def test_a_commit_keeps_what_lies_between_its_data_in_clusters_that_must_move(held: str, tmp_path: Path) -> None:
    rng = random.Random(held)
    model = bytearray(rng.randbytes(MIB))
    raw, base, top = sparse_file(tmp_path / "raw", bytes(model)), tmp_path / "base", tmp_path / "top"
    convert(raw, base, "qcow2", source_format="raw", options=OPTIONS, compressed=held == "compressed")
    if held == "snapshot":
        with cowhand.open(base, writable=True) as disk:
            create_snapshot(disk, "kept")
    create(str(top), "qcow2", backing=str(base), backing_format="qcow2", options=OPTIONS)
    with cowhand.open(top, writable=True) as disk:
        # A long stretch first: what it leaves in a buffer must show nowhere.
        for offset, length in ((0, MIB // 2), (MIB // 2, SUB), (MIB // 2 + 5 * SUB, SUB), (MIB // 2 + 31 * SUB, SUB)):
            model[offset : offset + length] = data = rng.randbytes(length)
            disk.write(offset, data)
    commit(top, drop=True)
    with cowhand.open(base) as disk:
        assert read_all(disk) == model


def test_the_lane_is_taken_and_numpy_is_not(tmp_path: Path) -> None:
    import subprocess
    import sys

    raw = sparse_file(tmp_path / "raw", content(random.Random(3), 2 * MIB, 30))
    code = (
        "import sys; from cowhand.copy.engine import sink; from cowhand.copy.ops.convert import convert; made = []; init = sink.LaneSink.__init__\n"
        "def noted(self, *args, **kwargs): made.append(self); init(self, *args, **kwargs)\n"
        "sink.LaneSink.__init__ = noted\n"
        f"convert({str(raw)!r}, {str(tmp_path / 'out')!r}, 'qcow2', source_format='raw', options={OPTIONS!r})\n"
        "assert made and 'numpy' not in sys.modules, (made, 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with cowhand.open(tmp_path / "out") as disk:
        assert read_all(disk) == raw.read_bytes()

"""Checking qcow2: counts, lines and exit codes as qemu-img's on any damage, by every way of counting, in bounded time."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.check import check as qcow2_check
from cowhand.block.formats.qcow2.refcount import l2_scan
from cowhand.block.node.records import CheckResult, Finding
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import ImageNotFound, InvalidArgument, NotSupported
from cowhand.image.check import check, check_node
from tests.qcow2 import damage, images
from tests.qcow2.images import Shape
from tests.tools.qemu import qemu_img, require_qemu

SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))


def checked(data: bytes) -> CheckResult:
    """Return what a check says of the image *data*."""
    keeper = Disk(MemoryNode(content=data))
    with images.open_over(keeper.root) as disk:
        result = check_node(disk.root)
    keeper.close()
    return result


def entries(data: bytearray, offset: int, count: int) -> list[int]:
    return list(struct.unpack_from(f">{count}Q", data, offset))


def put(data: bytearray, offset: int, entry: int) -> None:
    struct.pack_into(">Q", data, offset, entry)


@pytest.fixture
def written() -> bytearray:
    """Return an image with 64 KiB of data in 512-byte clusters."""
    return bytearray(images.create(Shape(), random.Random(1).randbytes(64 << 10)).snapshot_bytes())


def layout(data: bytearray) -> tuple[int, int, int]:
    """Return the offsets of the L1 table, the first L2 table and the first refcount block."""
    header = struct.unpack_from(">IIQIIQIIQQIIQ", data)
    return header[8], entries(data, header[8], 1)[0] & damage.OFFSET, entries(data, header[9], 1)[0]


# -- by hand


def test_a_sound_image_is_clean(written: bytearray) -> None:
    result = checked(bytes(written))
    assert result.clean and result.exit_code == 0 and result.messages == []
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (256, 128, 0)
    assert result.image_end_offset == len(written)
    assert result.to_json()["check-errors"] == 0 and "corruptions" not in result.to_json()


def test_a_count_that_is_too_high_is_a_leak(written: bytearray) -> None:
    _, l2, blocks = layout(written)
    cluster = (entries(written, l2, 1)[0] & damage.OFFSET) // 512
    struct.pack_into(">H", written, blocks + 2 * (cluster % 256), 3)
    result = checked(bytes(written))
    assert (result.leaks, result.corruptions, result.exit_code) == (1, 1, 2)
    assert result.messages == [
        f"Leaked cluster {cluster} refcount=3 reference=1",
        f"ERROR OFLAG_COPIED data cluster: l2_entry={entries(written, l2, 1)[0]:x} refcount=3",
    ]


def test_a_count_that_is_too_low_is_a_corruption(written: bytearray) -> None:
    _, l2, _ = layout(written)
    first = entries(written, l2, 1)[0]
    put(written, l2 + 8, first)
    result = checked(bytes(written))
    cluster = (first & damage.OFFSET) // 512
    assert result.messages == [
        f"ERROR cluster {cluster} refcount=1 reference=2",
        f"Leaked cluster {cluster + 1} refcount=1 reference=0",
    ]
    assert (result.corruptions, result.leaks) == (1, 1)


def test_what_lies_behind_the_end_is_told(written: bytearray) -> None:
    _, l2, _ = layout(written)
    put(written, l2 + 16, 1 << 63 | 1 << 40)
    result = checked(bytes(written))
    assert result.messages[0] == (
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x10000000000 size 0x200"
    )


def test_findings_say_what_is_wrong_where_and_whose_it_is(written: bytearray) -> None:
    l1, l2, blocks = layout(written)
    first = entries(written, l2, 1)[0]
    struct.pack_into(">H", written, blocks + 2 * ((first & damage.OFFSET) // 512 % 256), 3)
    put(written, l2 + 16, 1 << 63 | 1 << 40)
    put(written, l1 + 8, entries(written, l1 + 8, 1)[0] | 1)
    found = {finding.kind.name: finding.to_json() for finding in reversed(checked(bytes(written)).findings)}
    table = f"L2 table at {l2:#x}"
    for kind, status, cluster, offset, owner in (
        ("beyond-end-of-file", "error", (1 << 40) // 512, l2 + 16, table),
        ("l1-reserved-bits", "error", None, l1 + 8, "the active L1 table"),
        ("leaked-cluster", "leak", None, None, "refcount block 0"),
        ("copied-flag-of-data", "error", (first & damage.OFFSET) // 512, l2, table),
    ):
        said = found[kind]
        assert (said["status"], said["owner"]) == (status, owner)
        assert said.get("offset") == offset
        assert cluster is None or said["cluster"] == cluster
    assert (found["beyond-end-of-file"]["host"], found["beyond-end-of-file"]["length"]) == (1 << 40, 512)
    assert found["leaked-cluster"]["refcount"] > found["leaked-cluster"]["reference"]


def test_findings_are_listed_up_to_a_limit_and_all_are_counted(
    written: bytearray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qcow2_check, "MAX_FINDINGS", 10)
    _, _, blocks = layout(written)
    written[blocks : blocks + 512] = b"\0\7" * 256
    heard: list[Finding] = []
    keeper = Disk(MemoryNode(content=bytes(written)))
    with images.open_over(keeper.root) as disk:
        result = check_node(disk.root, on_finding=heard.append)
    keeper.close()
    assert heard == result.findings and len(heard) == 11
    assert heard[-1].text == "More than 10 findings: the others are counted, but not listed"
    assert result.corruptions + result.leaks > 200


def test_a_check_writes_nothing(written: bytearray, tmp_path: Path) -> None:
    _, l2, _ = layout(written)
    put(written, l2, 0)
    path = tmp_path / "i.qcow2"
    path.write_bytes(written)
    assert check(path).exit_code == 3
    assert path.read_bytes() == written


def test_an_image_in_use_is_checked_as_it_is_now() -> None:
    keeper = Disk(images.create(Shape()))
    with images.open_over(keeper.root, writable=True) as disk:
        disk.write(0, b"x" * 40000)
        disk.discard(512, 8192)
        result = check_node(disk.root)
        assert result.clean, result.messages
        disk.write(512, b"y" * 8192)
        assert check_node(disk.root).clean
    keeper.close()


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(1024))
    with pytest.raises(NotSupported) as caught:
        check(raw, format="raw")
    assert caught.value.qemu() == "This image format does not support checks"
    with pytest.raises(ImageNotFound):
        check(tmp_path / "none")
    with pytest.raises(InvalidArgument):
        check(raw, repair="some")


def test_a_marked_image_is_checked_although_it_is_not_opened_for_writing(written: bytearray, tmp_path: Path) -> None:
    put(written, 72, 2)
    path = tmp_path / "i.qcow2"
    path.write_bytes(written)
    assert check(path).clean


# -- every way of counting


@pytest.mark.parametrize("plain", [0, 1 << 30])
@pytest.mark.parametrize("bits", [1, 4, 8, 16, 32, 64])
def test_few_tables_and_many_are_counted_alike(plain: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numpy from the first table on, and never with it."""
    monkeypatch.setattr(l2_scan, "PLAIN_TABLES", plain)
    shape = Shape(refcount_bits=bits, size=1 << 20)
    keeper = Disk(images.create(shape))
    rng = random.Random(bits)
    with images.open_over(keeper.root, writable=True) as disk:
        for _ in range(60):
            disk.write(rng.randrange(2000) * 512, rng.randbytes(rng.choice((512, 512, 30000)))[: 1 << 14])
        if shape.snapshots:
            for name in "ab":
                images.snapshot_create(disk, name)
                disk.write(rng.randrange(1000) * 512, rng.randbytes(9000))
        assert check_node(disk.root).messages == []
    data = bytearray(keeper.root.snapshot_bytes())  # type: ignore[attr-defined]
    keeper.close()
    damage.damage(data, rng, cut=False)
    found = checked(bytes(data))
    monkeypatch.setattr(l2_scan, "PLAIN_TABLES", 100 if plain == 0 else 0)
    again = checked(bytes(data))
    assert (found.messages, found.to_json()) == (again.messages, again.to_json())


# -- as QEMU


@require_qemu
@pytest.mark.parametrize("seed", range(max(1, int(24 * SCALE))))
def test_any_damage_is_judged_as_qemu_judges_it(seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"check {seed} {os.environ.get('COWHAND_SEED', '')}")
    path = tmp_path / "image"
    damage.make(path, rng)
    sound = path.read_bytes()
    assert damage.our_verdict(path) == damage.qemus_verdict(path)
    for _ in range(12):
        data = bytearray(sound)
        done = damage.damage(data, rng)
        path.write_bytes(data)
        ours, theirs = damage.our_verdict(path), damage.qemus_verdict(path)
        assert (ours.code, ours.counts) == (theirs.code, theirs.counts), done
        if theirs.counts is not None:
            assert ours.lines == theirs.lines, done


@require_qemu
def test_bitmaps_and_the_luks_header_are_no_leaks(tmp_path: Path) -> None:
    path = tmp_path / "bitmaps"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M")
    for name in ("a", "b"):
        qemu_img("bitmap", "--add", path, name)
    assert damage.our_verdict(path) == damage.qemus_verdict(path)
    assert check(path).clean
    secret = ("--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100")
    path = tmp_path / "luks"
    for _ in range(20):  # on a busy machine QEMU cannot time its key derivation, and gives up
        if qemu_img("create", "-q", "-f", "qcow2", *secret, path, "1M", check=False).status == 0:
            break
    assert check(path).clean


# -- hostile


def hostile(l1_entries: int) -> bytearray:
    """Return an image whose L1 table names one L2 table *l1_entries* times."""
    bits, size = 9, l1_entries * 64 * 512
    data = bytearray(4096 + l1_entries * 8)
    struct.pack_into(">IIQIIQIIQQIIQ", data, 0, 0x514649FB, 3, 0, 0, bits, size, 0, l1_entries, 4096, 512, 1, 0, 0)
    struct.pack_into(">QQQII", data, 72, 0, 0, 0, 4, 104)
    put(data, 512, 1024)
    for cluster in range(len(data) // 512):
        if cluster < 256:
            struct.pack_into(">H", data, 1024 + 2 * cluster, 1)
    for index in range(64):
        put(data, 1536 + index * 8, 1 << 63 | 2048)
    data[4096:] = struct.pack(">Q", 1536) * l1_entries
    return data


def test_a_table_that_is_named_millions_of_times_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(hostile(1 << 18))
    begin = time.process_time()
    result = check(path, format="qcow2")
    assert time.process_time() - begin < 40  # a table a time takes hours
    assert result.allocated_clusters == 64 << 18
    assert result.fragmented_clusters == 63 << 18
    # 65,535 references fit, the others are told one by one.
    assert result.corruptions >= (1 << 18) - 65535


def test_sparse_giants_cost_what_their_references_cost(tmp_path: Path) -> None:
    path = tmp_path / "giant"
    data = hostile(64)
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(1 << 39)
        for index in range(64):
            file.seek(1536 + index * 8)
            file.write(struct.pack(">Q", 1 << 63 | (index + 1) << 33))
    begin = time.process_time()
    result = check(path, format="qcow2")
    assert time.process_time() - begin < 40  # a table a time takes hours
    assert result.corruptions > 64

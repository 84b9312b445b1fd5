"""Internal snapshots of qcow2: made, applied, deleted and read, also by QEMU in turn; refused without a trace; safe at any crash."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.refcount import bulk_update, l2_scan
from cowhand.block.formats.qcow2.snapshot.operations import next_id
from cowhand.block.formats.qcow2.snapshot.table import Snapshot, encode_table
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import (
    ImageInUse,
    InvalidArgument,
    InvalidFormat,
    NotSupported,
    ReadOnly,
    SnapshotNotFound,
)
from cowhand.drivers import REGISTRY
from cowhand.image.check import check_node
from cowhand.image.create import create
from cowhand.image.snapshots import (
    apply_snapshot,
    choose_as_qemu,
    create_snapshot,
    delete_snapshot,
    find_snapshot,
    list_snapshots,
    open_snapshot,
)
from cowhand.testing import replay
from cowhand.testing.model import compare
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import images, oracle
from tests.qcow2.images import Shape
from tests.tools.qemu import assert_clean, assert_identical, qemu_img, qemu_io, require_qemu

SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))


@contextmanager
def opened(shape: Shape | None = None, content: bytes = b"", image: MemoryNode | None = None) -> Iterator[Disk]:
    """Open an image in memory for writing, and check it with both checkers when it is closed."""
    keeper = Disk(image if image is not None else images.create(shape or Shape(), content))
    with images.open_over(keeper.root, writable=True) as disk:
        yield disk
    data = keeper.root.snapshot_bytes()  # type: ignore[attr-defined]
    findings = oracle.Image(data).check()
    assert (findings.corruptions, findings.leaks, findings.flags) == ([], [], [])
    with images.open_over(keeper.root) as disk:
        assert check_node(disk.root).messages == []
    keeper.close()


def content_of(disk: Disk) -> bytes:
    return disk.read(0, disk.size)


# -- the records


def test_a_record_tells_all_that_was_given() -> None:
    with opened() as disk:
        info = create_snapshot(disk, "näme", date=(1700000000, 5), vm_clock_nsec=77, icount=3)
        assert info == list_snapshots(disk)[0] == find_snapshot(disk, "1") == find_snapshot(disk, "näme")
        assert (info.id, info.name, info.disk_size, info.vm_state_size) == ("1", "näme", disk.size, 0)
        assert (info.date_sec, info.date_nsec, info.vm_clock_nsec, info.icount) == (1700000000, 5, 77, 3)
        assert create_snapshot(disk, "second").icount is None
        delete_snapshot(disk, "1")
        assert [s.id for s in list_snapshots(disk)] == ["2"]
        assert create_snapshot(disk, "third").id == "3"


def test_ids_follow_the_greatest_number_as_qemu_gives_them() -> None:
    def record(ident: str) -> Snapshot:
        return Snapshot(ident, "", 0, 0, 0)

    assert next_id([]) == "1"
    assert next_id([record("7"), record("3")]) == "8"
    assert next_id([record("12abc"), record("x99")]) == "13"


def test_a_word_that_means_two_snapshots_is_refused_and_both_are_named() -> None:
    with opened() as disk:
        create_snapshot(disk, "2")
        disk.write(0, b"x" * 512)
        second = create_snapshot(disk, "1")
        disk.write(0, b"y" * 512)
        for verb in (apply_snapshot, delete_snapshot, open_snapshot):
            with pytest.raises(
                InvalidArgument, match=r"(?s)id '1' and the name '2' and .* id '2' and the name '1'.*snapshot\.id=1"
            ):
                verb(disk, "1")
        for wanted, content in (("snapshot.id=1", b"\0"), ("snapshot.name=1", b"x"), (second, b"x")):
            apply_snapshot(disk, wanted)
            assert disk.read(0, 1) == content
        assert [one.name for one in list_snapshots(disk)] == ["2", "1"]


def test_a_name_that_two_snapshots_have_is_refused() -> None:
    with opened() as disk:
        for _ in range(2):
            create_snapshot(disk, "night")
        with pytest.raises(InvalidArgument, match=r"snapshot\.id=1 or snapshot\.id=2"):
            delete_snapshot(disk, "night")
        delete_snapshot(disk, "snapshot.id=2")
        assert [one.id for one in list_snapshots(disk)] == ["1"]


def test_as_in_qemu_an_id_goes_before_every_name() -> None:
    with opened() as disk:
        for name in ("2", "1", "1"):
            create_snapshot(disk, name)
        known = list_snapshots(disk)
        assert [choose_as_qemu(known, word, "").id for word in ("1", "2", "3")] == ["1", "2", "3"]
        with pytest.raises(SnapshotNotFound):
            choose_as_qemu(known, "4", "")


def test_what_is_unknown_in_a_record_is_kept() -> None:
    with opened(content=b"a" * 5000) as disk:
        create_snapshot(disk, "one")
        node: Any = disk.root
        node.snapshots[0].unknown_extra = b"FUTURE--" * 3
        create_snapshot(disk, "two")
        image = node.file.node.copy()
        assert b"FUTURE--" * 3 in image.snapshot_bytes()
    with opened(image=image) as disk:
        assert disk.root.snapshots[0].unknown_extra == b"FUTURE--" * 3  # type: ignore[attr-defined]
        delete_snapshot(disk, "two")
        assert disk.root.snapshots[0].extra_size == 24 + 24  # type: ignore[attr-defined]


# -- content


@pytest.mark.parametrize("plain", [0, 1 << 30])
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(version=2), Shape(cluster=4096, size=1 << 20), Shape(refcount_bits=4)], ids=str
)
def test_random_histories_keep_every_snapshot(shape: Shape, plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few tables, and with the way that many are counted."""
    monkeypatch.setattr(l2_scan, "PLAIN_TABLES", plain)
    rng = random.Random(f"{shape} {plain} {os.environ.get('COWHAND_SEED', '')}")
    with opened(shape) as disk:
        kept: dict[str, bytes] = {}
        for step in range(40):
            offset = rng.randrange(disk.size // 512) * 512
            length = min(rng.choice((512, 4096, 20000)), disk.size - offset)
            verb = rng.randrange(8)
            if verb <= 2:
                disk.write(offset, rng.randbytes(length))
            elif verb == 3:
                disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            elif verb <= 5 and len(kept) < 6:
                kept[f"s{step}"] = content_of(disk)
                create_snapshot(disk, f"s{step}")
            elif verb == 6 and kept:
                name = rng.choice(sorted(kept))
                apply_snapshot(disk, name)
                compare(kept[name], content_of(disk), "applied")
            elif kept:
                name = rng.choice(sorted(kept))
                delete_snapshot(disk, name)
                del kept[name]
            for name, content in kept.items():
                with open_snapshot(disk, name) as view:
                    compare(content, content_of(view), name)
        now = content_of(disk)
        while kept:
            delete_snapshot(disk, kept.popitem()[0])
        compare(now, content_of(disk), "after the last snapshot is gone")


def test_a_clusters_alone_again_is_written_in_place() -> None:
    with opened(content=b"a" * 8192) as disk:
        create_snapshot(disk, "s")
        delete_snapshot(disk, "s")
        before = disk.root.file.node.size  # type: ignore[attr-defined]
        disk.write(0, b"b" * 8192)
        disk.flush()
        assert disk.root.file.node.size == before  # type: ignore[attr-defined]


def test_a_disk_of_another_size_comes_back() -> None:
    with opened(Shape(size=64 << 10), b"a" * 3000) as disk:
        create_snapshot(disk, "small")
        disk.resize(3 << 20)
        disk.write((3 << 20) - 512, b"end!" * 128)
        create_snapshot(disk, "large")
        apply_snapshot(disk, "small")
        assert disk.size == 64 << 10 and disk.read(0, 3000) == b"a" * 3000
        disk.write(0, b"c" * 1000)
        apply_snapshot(disk, "large")
        assert disk.size == 3 << 20 and disk.read(disk.size - 4, 4) == b"end!" and disk.read(0, 3000) == b"a" * 3000
        with open_snapshot(disk, "small") as view:
            assert view.size == 64 << 10


def test_vm_state_goes_with_the_snapshot() -> None:
    with opened(content=b"a" * 3000) as disk:
        state = random.Random(1).randbytes(20000)
        disk.write_vmstate(0, state)
        create_snapshot(disk, "s", vm_state_size=len(state))
        assert list_snapshots(disk)[0].vm_state_size == len(state)
        assert disk.read_vmstate(0, len(state)) == bytes(len(state))
        with open_snapshot(disk, "s") as view:
            assert view.read_vmstate(0, len(state)) == state
        apply_snapshot(disk, "s")
        assert disk.read_vmstate(0, len(state)) == state


# -- views


def test_a_view_is_read_while_the_disk_is_written() -> None:
    with opened(content=b"a" * 8192) as disk:
        create_snapshot(disk, "s")
        with open_snapshot(disk, "s") as view:
            assert view.read_only and view.size == disk.size
            with pytest.raises(ReadOnly):
                view.write(0, b"x")
            disk.write(0, b"b" * 8192)
            disk.discard(4096, 4096)
            disk.flush()
            assert view.read(0, 8192) == b"a" * 8192
            with pytest.raises(ImageInUse):
                delete_snapshot(disk, "s")
            create_snapshot(disk, "t")
            apply_snapshot(disk, "s")
            assert view.read(0, 8192) == b"a" * 8192
        delete_snapshot(disk, "s")


def test_a_view_outlives_its_disk() -> None:
    keeper = Disk(images.create(Shape(), b"a" * 4096))
    disk = images.open_over(keeper.root, writable=True)
    create_snapshot(disk, "s")
    disk.write(0, b"b" * 4096)
    view = open_snapshot(disk, "s")
    disk.close()
    assert view.read(0, 4096) == b"a" * 4096
    view.close()
    keeper.close()


def test_the_backing_file_shows_through_a_view() -> None:
    base = random.Random(2).randbytes(128 << 10)
    keeper = Disk(images.create(Shape()))
    with images.open_over(keeper.root, MemoryNode(content=base), writable=True) as disk:
        create_snapshot(disk, "s")
        disk.write(0, b"b" * 4096)
        with open_snapshot(disk, "s") as view:
            assert content_of(view) == base
            assert sum(batch.length[0] for batch in view.extents()) > 0
    keeper.close()


# -- refusals


def test_other_formats_refuse(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(4096))
    with cowhand.open(path, format="raw", writable=True) as disk:
        for act in (lambda: list_snapshots(disk), lambda: create_snapshot(disk, "s")):
            with pytest.raises(NotSupported):
                act()


def test_what_is_not_there_and_what_is_not_writable() -> None:
    with opened() as disk:
        for act in (apply_snapshot, delete_snapshot, open_snapshot):
            with pytest.raises(SnapshotNotFound):
                act(disk, "none")
        with pytest.raises(InvalidArgument):
            create_snapshot(disk, "n" * 256)
        create_snapshot(disk, "s")
        with disk.lease(), pytest.raises(InvalidArgument):
            apply_snapshot(disk, "s")
        image = disk.root.file.node.copy()  # type: ignore[attr-defined]
    keeper = Disk(image)
    with images.open_over(keeper.root) as disk:
        for change in (create_snapshot, apply_snapshot, delete_snapshot):
            with pytest.raises(ReadOnly):
                change(disk, "s")
        assert len(list_snapshots(disk)) == 1
    keeper.close()


@pytest.mark.parametrize("bits", [1, 2])
def test_a_count_that_would_overflow_changes_nothing(bits: int) -> None:
    with opened(Shape(refcount_bits=bits), b"a" * 40000) as disk:
        allowed = (1 << bits) - 2
        for number in range(allowed):
            create_snapshot(disk, f"s{number}")
        disk.flush()
        before = disk.root.file.node.snapshot_bytes()  # type: ignore[attr-defined]
        with pytest.raises(InvalidFormat) as caught:
            create_snapshot(disk, "one too many")
        assert caught.value.qemu() == "Invalid argument"
        disk.flush()
        assert disk.root.file.node.snapshot_bytes() == before  # type: ignore[attr-defined]
        assert len(list_snapshots(disk)) == allowed
        disk.write(0, b"b" * 40000)


def uncounted(cluster: int) -> Disk:
    """Return what holds an image of 40,000 bytes whose host *cluster* is counted as free."""
    image = images.create(Shape(), b"a" * 40000)
    data = bytearray(image.snapshot_bytes())
    block = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 48)[0])[0]
    struct.pack_into(">H", data, block + 2 * cluster, 0)
    return Disk(MemoryNode(content=bytes(data)))


def test_a_cluster_that_was_counted_as_free_stays_the_snapshots() -> None:
    keeper = uncounted(40)
    with images.open_over(keeper.root, writable=True) as disk:
        create_snapshot(disk, "s")
        disk.write(0, b"b" * 40000)
        disk.flush()
        with open_snapshot(disk, "s") as view:
            assert view.read(0, 40000) == b"a" * 40000
    keeper.close()


def lying(change: Callable[[bytearray, int], None]) -> bytes:
    """Return an image with one snapshot whose table *change* was let at: (file, offset of the table)."""
    keeper = Disk(images.create(Shape(), b"a" * 5000))
    with images.open_over(keeper.root, writable=True) as disk:
        create_snapshot(disk, "s")
    data = bytearray(keeper.root.snapshot_bytes())  # type: ignore[attr-defined]
    keeper.close()
    change(data, struct.unpack_from(">Q", data, 64)[0])
    return bytes(data)


def put(fmt: str, at: int, value: int) -> Callable[[bytearray, int], None]:
    return lambda data, table: struct.pack_into(fmt, data, table + at, value)


@pytest.mark.parametrize(
    "change",
    [put(">I", 36, 1025), put(">I", 36, 0xFFFFFFFF), lambda data, table: struct.pack_into(">I", data, 60, 65537)],
)
def test_a_table_past_its_limits_is_refused_at_once(change: Callable[[bytearray, int], None]) -> None:
    keeper = Disk(MemoryNode(content=lying(change)))
    with pytest.raises(InvalidFormat):
        images.open_over(keeper.root)
    keeper.close()


@pytest.mark.parametrize("change", [put(">Q", 0, 513), put(">I", 8, 0xFFFFFFFF), put(">Q", 0, 1 << 63)])
def test_a_snapshot_whose_tables_are_not_possible_is_refused(change: Callable[[bytearray, int], None]) -> None:
    keeper = Disk(MemoryNode(content=lying(change)))
    with images.open_over(keeper.root) as disk:
        assert list_snapshots(disk)[0].name == "s"
        with pytest.raises(InvalidFormat):
            open_snapshot(disk, "s")
    keeper.close()


def test_a_table_that_would_be_too_large_is_not_written() -> None:
    many = [Snapshot(str(i), "n" * 1000, 0, 0, 0, unknown_extra=bytes(1000)) for i in range(40000)]
    with pytest.raises(InvalidFormat):
        encode_table(many, path="x")
    assert len(encode_table(many[:10], path="x")) < L.MAX_SNAPSHOT_TABLE_BYTES


# -- crashes


def test_going_back_by_a_long_table_survives_any_crash() -> None:
    """An L1 table of more than a sector is not overwritten but switched, together with the disk's size."""
    rng = random.Random(5)
    recorder = RecorderNode(images.create(Shape(size=4 << 20), rng.randbytes(9000)), sector=512)
    keeper = Disk(recorder)
    disk = images.open_over(recorder, writable=True)
    old = content_of(disk)
    create_snapshot(disk, "s")
    disk.resize(5 << 20)
    disk.write(0, rng.randbytes(7000))
    disk.write(4 << 20, rng.randbytes(7000))
    new = content_of(disk)
    disk.flush()
    begin = recorder.log.now()
    apply_snapshot(disk, "s")
    end = recorder.log.now()
    disk.close()
    keeper.close()
    seen: set[bool] = set()

    def judge(state: replay.CrashState) -> None:
        if state.moment < begin:
            return
        image = oracle.Image(state.image.snapshot_bytes())
        assert image.check().corruptions == []
        content = image.content()
        assert content in (old, new)
        assert content == old or state.moment < end
        assert image.content(image.snapshots[0]) == old
        seen.add(content == old)

    for states in (
        replay.prefixes(recorder.log), replay.torn(recorder.log, (512,)), replay.singles(recorder.log), replay.sampled(recorder.log, 100),
    ):  # fmt: skip
        replay.replay(states, judge)
    assert seen == {True, False}


# -- with QEMU


def offsets(path: Path) -> list[Any]:
    """Return where an image's tables are: L1, refcount table, snapshot table, the snapshots' L1 tables, L2 tables."""
    data = path.read_bytes()
    header = struct.unpack_from(">IIQIIQIIQQIIQ", data)
    found: list[Any] = [header[5], header[7:11], header[11], header[12] if header[11] else 0]
    at = header[12]
    for _ in range(header[11]):
        entry = struct.unpack_from(">QIHHIIQII", data, at)
        found.append(entry[:2])
        at += 40 + entry[8] + entry[2] + entry[3]
        at += -at % 8
    found.append([entry & 0x00FFFFFFFFFFFE00 for entry in struct.unpack_from(f">{header[7]}Q", data, header[8])])
    return found


@require_qemu
@pytest.mark.parametrize("seed", range(max(1, int(10 * SCALE))))
def test_the_same_history_gives_the_image_that_qemu_makes(seed: int, tmp_path: Path) -> None:
    """Tables lie where QEMU puts them, content and counts are the same, and either goes on where the other stopped."""
    rng = random.Random(f"place {seed} {os.environ.get('COWHAND_SEED', '')}")
    cluster, bits = rng.choice((512, 4096, 65536)), rng.choice((8, 16, 64))
    size = rng.choice((256 << 10, 1 << 20)) * (4 if cluster > 512 else 1)
    theirs, ours, mixed = (tmp_path / name for name in ("theirs", "ours", "mixed"))
    for path in (theirs, ours, mixed):
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},refcount_bits={bits}", path, str(size))
    names: list[str] = []
    for step in range(12):
        if rng.random() < 0.5:
            offset = rng.randrange(size // cluster) * cluster
            length = min(size - offset, rng.choice((1, 2, 5)) * cluster)
            verb, what = "write", f"write -P {step} {offset} {length}"
        else:
            verb = rng.choice(("-c", "-c", "-a", "-d")) if names else "-c"
            what = f"s{step}" if verb == "-c" else rng.choice(names)
            if verb == "-c":
                names.append(what)
            elif verb == "-d":
                names.remove(what)
        for path in (theirs, ours, mixed):
            if path == theirs or (path == mixed and step % 2):
                _by_qemu(path, verb, what)
            else:
                _by_us(path, verb, what)
        assert offsets(ours) == offsets(theirs)
    for path in (ours, mixed):
        assert_clean(path)
        assert_identical(theirs, "qcow2", path, "qcow2")
        for name in names:
            flat = [tmp_path / "a.raw", tmp_path / "b.raw"]
            for source, target in zip((theirs, path), flat, strict=True):
                qemu_img("convert", "-l", name, "-f", "qcow2", "-O", "raw", source, target)
            with cowhand.open(path, format="qcow2") as disk, open_snapshot(disk, name) as view:
                assert flat[0].read_bytes() == flat[1].read_bytes() == content_of(view)


def _by_qemu(path: Path, verb: str, what: str) -> None:
    if verb == "write":
        qemu_io(path, what, format="qcow2")
    else:
        qemu_img("snapshot", verb, what, path)


def _by_us(path: Path, verb: str, what: str) -> None:
    with cowhand.open(path, format="qcow2", writable=True) as disk:
        if verb == "write":
            _, _, pattern, offset, length = what.split()
            disk.write(int(offset), bytes([int(pattern)]) * int(length))
        else:
            {"-c": create_snapshot, "-a": apply_snapshot, "-d": delete_snapshot}[verb](disk, what)


@require_qemu
def test_compressed_clusters_are_shared_and_freed(tmp_path: Path) -> None:
    path, flat = tmp_path / "c.qcow2", tmp_path / "c.raw"
    flat.write_bytes(b"".join(bytes([i]) * 3000 + random.Random(i).randbytes(1096) for i in range(200)))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", flat, path)
    with cowhand.open(path, writable=True) as disk:
        create_snapshot(disk, "s")
        assert_clean_open(disk)
        disk.write(0, b"n" * 300000)
        create_snapshot(disk, "t")
        apply_snapshot(disk, "s")
        assert content_of(disk) == flat.read_bytes()
        delete_snapshot(disk, "s")
        assert_clean_open(disk)
        delete_snapshot(disk, "t")
        disk.write_zeroes(0, disk.size, unmap=True)
        assert_clean_open(disk)
    assert_clean(path)


def assert_clean_open(disk: Disk) -> None:
    assert check_node(disk.root).messages == []


@require_qemu
def test_qemu_reads_our_records(tmp_path: Path) -> None:
    path = tmp_path / "i.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with cowhand.open(path, writable=True) as disk:
        disk.write_vmstate(0, b"v" * 70000)
        create_snapshot(disk, "with state", date=(1700000000, 123), vm_state_size=70000, vm_clock_nsec=5_000_000_000)
        create_snapshot(disk, "without")
    listed = qemu_img("info", "--output=json", path).json()["snapshots"]
    assert [(s["id"], s["name"], s["vm-state-size"], s["vm-clock-sec"]) for s in listed] == [
        ("1", "with state", 70000, 5),
        ("2", "without", 0, 0),
    ]
    assert (listed[0]["date-sec"], listed[0]["date-nsec"]) == (1700000000, 123)
    qemu_img("snapshot", "-a", "with state", path)
    with cowhand.open(path) as disk:
        assert disk.read_vmstate(0, 70000) == b"v" * 70000


def test_deleting_gives_space_back_where_discards_are_passed(tmp_path: Path) -> None:
    path = tmp_path / "i.qcow2"
    create(path, "qcow2", 4 << 20)
    with cowhand.open(path, writable=True, options={"discard": "unmap"}) as disk:
        disk.write(0, random.Random(1).randbytes(2 << 20))
        create_snapshot(disk, "s")
        disk.write(0, random.Random(2).randbytes(2 << 20))
        disk.flush()
        before = path.stat().st_blocks
        delete_snapshot(disk, "s")
        assert path.stat().st_blocks <= before - (2 << 20) // 512 + 64
        assert_clean_open(disk)


def test_a_filter_above_does_not_hide_snapshots() -> None:
    keeper = Disk(images.create(Shape(), b"a" * 600))
    image = {"driver": "qcow2", "file": keeper.root}
    root = Opening(REGISTRY).open({"driver": "blkdebug", "image": image, "read-only": False})
    with Disk(root, writable=True) as disk:
        create_snapshot(disk, "s")
        disk.write(0, b"b" * 600)
        assert [s.name for s in list_snapshots(disk)] == ["s"]
        apply_snapshot(disk, "s")
        assert disk.read(0, 600) == b"a" * 600
        delete_snapshot(disk, "s")
    keeper.close()


def test_many_counts_change_by_numpy_however_they_were_counted(tmp_path: Path) -> None:
    """All clusters of 256 MiB mapped in order, which is counted without numpy: changing their counts one by one would take ten times as long."""
    create(tmp_path / "x", "qcow2", 256 << 20, {"cluster_size": "512", "preallocation": "metadata"})
    with cowhand.open(tmp_path / "x", writable=True) as disk:
        node: Any = disk.root
        change = bulk_update.references(node, bytes(node.mapping.l1.data))
        change.numpy = None
        bulk_update.verify(node, change, 1)
        assert change.numpy is not None
        create_snapshot(disk, "s")
        delete_snapshot(disk, "s")
    assert_clean(tmp_path / "x")


def test_a_snapshot_that_is_being_deleted_is_not_opened_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looked it up just before would read clusters that others get next."""
    found: list[object] = []
    with opened(content=b"a" * 20000) as disk:
        create_snapshot(disk, "s")
        disk.write(0, b"b" * 20000)

        def read() -> None:
            try:
                with open_snapshot(disk, "s") as view:
                    found.append(view.read(0, 1))
            except SnapshotNotFound as error:
                found.append(error)

        thread = threading.Thread(target=read)
        flush = disk.root.flush

        def reading_meanwhile() -> None:
            if not thread.ident:
                thread.start()
                thread.join(0.1)
            flush()

        monkeypatch.setattr(disk.root, "flush", reading_meanwhile)
        delete_snapshot(disk, "s")
        thread.join()
    assert [type(answer) for answer in found] == [SnapshotNotFound]


@pytest.mark.parametrize("many", [0, 1 << 40], ids=["numpy", "plain"])
def test_a_damaged_count_of_something_else_is_no_obstacle(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of 64 bits may be greater on disk than any that is possible; only those that change are judged."""
    monkeypatch.setattr(bulk_update, "_MANY_COUNTS", many)
    image = images.create(Shape(refcount_bits=64), b"a" * 5000)
    data = bytearray(image.snapshot_bytes())
    block = oracle.Image(bytes(data)).words(oracle.Image(bytes(data)).table_offset, 1)[0]
    data[block + 63 * 8 : block + 64 * 8] = b"\xff" * 8
    with Disk(MemoryNode(content=bytes(data))) as keeper, images.open_over(keeper.root, writable=True) as disk:
        create_snapshot(disk, "s")
        assert [snapshot.name for snapshot in list_snapshots(disk)] == ["s"]

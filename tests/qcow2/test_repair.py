"""Repairing qcow2: what qemu-img repairs is repaired as it does; what it would destroy is kept; no crash makes it worse."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.node.records import CheckResult
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core import diagnostics
from cowhand.core.errors import ImageCorrupt
from cowhand.drivers import REGISTRY
from cowhand.image.check import check, check_node
from cowhand.image.snapshots import list_snapshots, open_snapshot
from cowhand.testing import replay
from cowhand.testing.faults import CHANGES, FaultNode
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import damage, images, oracle
from tests.qcow2.images import Shape
from tests.tools.qemu import assert_clean, qemu_img, qemu_io, require_qemu

SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))


def mended(node: Disk | MemoryNode, repair: str = "all") -> CheckResult:
    """Repair the image that *node* holds, as the tool does."""
    file = node.root if isinstance(node, Disk) else node
    opening = Opening(REGISTRY)
    opening.for_repair = True
    root = opening.open({"driver": "qcow2", "file": file, "read-only": False})
    with Disk(root, writable=True) as disk:
        return check_node(disk.root, repair=repair)


def tables(data: bytes | bytearray) -> tuple[int, int, int]:
    """Return the offsets of the L1 table, the refcount table and the first refcount block."""
    header = struct.unpack_from(">IIQIIQIIQQIIQ", data)
    return header[8], header[9], struct.unpack_from(">Q", data, header[9])[0]


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(90 << 10)


@pytest.fixture
def image(content: bytes) -> bytearray:
    """Return an image in 512-byte clusters with a snapshot and some clusters of its own."""
    keeper = Disk(images.create(Shape(), content))
    with images.open_over(keeper.root, writable=True) as disk:
        images.snapshot_create(disk, "s")
        disk.write(1000, b"n" * 5000)
    data = bytearray(keeper.root.snapshot_bytes())  # type: ignore[attr-defined]
    keeper.close()
    return data


def judged(data: bytes | bytearray, content: bytes) -> None:
    """Raise unless the image is sound and both its states are what they were."""
    found = oracle.Image(bytes(data))
    findings = found.check()
    assert (findings.corruptions, findings.leaks, findings.flags) == ([], [], [])
    now = bytearray(content.ljust(found.size, b"\0"))
    now[1000:6000] = b"n" * 5000
    assert found.content() == now
    assert found.content(found.snapshots[0]) == content.ljust(found.size, b"\0")


def repaired(data: bytearray, repair: str = "all") -> tuple[CheckResult, bytes]:
    keeper = Disk(MemoryNode(content=bytes(data)))
    result = mended(keeper, repair)
    out: bytes = keeper.root.snapshot_bytes()  # type: ignore[attr-defined]
    keeper.close()
    return result, out


# -- one kind of damage at a time


def test_leaks_are_given_back(image: bytearray, content: bytes) -> None:
    _, _, block = tables(image)
    end = len(image) // 512
    image += bytes(3 * 512)
    for cluster in range(end, end + 3):
        struct.pack_into(">H", image, block + 2 * cluster, 1)
    result, out = repaired(image, "leaks")
    assert (result.leaks_fixed, result.corruptions_fixed, result.exit_code) == (3, 0, 0)
    assert f"Repairing cluster {end} refcount=1 reference=0" in result.messages
    judged(out, content)


def test_errors_are_not_touched_when_only_leaks_are_to_be(image: bytearray) -> None:
    _, _, block = tables(image)
    struct.pack_into(">H", image, block + 2 * 100, 7)
    struct.pack_into(">H", image, block + 2 * 101, 1)
    result, out = repaired(image, "leaks")
    assert result.corruptions and result.leaks_fixed == 1 and result.exit_code == 2
    assert struct.unpack_from(">2H", out, block + 200) == (2, 1)


def test_counts_that_are_too_low_are_raised(image: bytearray, content: bytes) -> None:
    _, _, block = tables(image)
    for cluster in range(90, 120):
        struct.pack_into(">H", image, block + 2 * cluster, 1)
    result, out = repaired(image)
    assert result.corruptions_fixed > 20 and result.clean
    judged(out, content)


@pytest.mark.parametrize("bits", [1, 2, 8, 16, 64])
def test_a_lost_refcount_structure_is_made_anew(bits: int) -> None:
    content = random.Random(bits).randbytes(100 << 10)
    data = bytearray(images.create(Shape(refcount_bits=bits), content).snapshot_bytes())
    _, table, _ = tables(data)
    data[table : table + 512] = bytes(512)
    result, out = repaired(data)
    assert "Rebuilding refcount structure" in result.messages
    assert result.clean and result.corruptions_fixed > 100
    found = oracle.Image(out)
    assert found.check().corruptions == found.check().leaks == []
    assert found.content() == content.ljust(found.size, b"\0")


def test_flags_follow_the_counts(image: bytearray, content: bytes) -> None:
    l1, _, _ = tables(image)
    l2 = struct.unpack_from(">Q", image, l1)[0] & damage.OFFSET
    for at in (l1, *range(l2, l2 + 512, 8)):
        struct.pack_into(">Q", image, at, struct.unpack_from(">Q", image, at)[0] ^ 1 << 63)
    result, out = repaired(image)
    assert result.corruptions_fixed == 65 and result.clean
    judged(out, content)


def test_a_zero_cluster_in_an_impossible_place_stays_zero() -> None:
    shape = bytearray(images.create(Shape(cluster=4096), b"a" * 50000).snapshot_bytes())
    l1, _, _ = tables(shape)
    l2 = struct.unpack_from(">Q", shape, l1)[0] & damage.OFFSET
    struct.pack_into(">Q", shape, l2 + 8, struct.unpack_from(">Q", shape, l2 + 8)[0] | 0x201)
    result, out = repaired(shape)
    assert any("Preallocated cluster is not properly aligned" in line for line in result.messages)
    assert result.clean
    assert struct.unpack_from(">Q", out, l2 + 8)[0] == 1
    assert oracle.Image(out).content()[4096:8192] == bytes(4096)


def test_marks_go_when_the_image_is_sound_again(image: bytearray, content: bytes) -> None:
    struct.pack_into(">Q", image, 72, 3)
    result, out = repaired(image)
    assert result.clean
    assert struct.unpack_from(">Q", out, 72)[0] == 0
    judged(out, content)


def test_marks_stay_when_it_is_not(image: bytearray) -> None:
    struct.pack_into(">Q", image, 72, 2)
    l1, _, _ = tables(image)
    l2 = struct.unpack_from(">Q", image, l1)[0] & damage.OFFSET
    struct.pack_into(">Q", image, l2 + 8, 1 << 63 | 1 << 40)
    result, out = repaired(image)
    assert result.corruptions and struct.unpack_from(">Q", out, 72)[0] == 2


# -- snapshot tables


def test_records_are_completed_and_cut(image: bytearray, content: bytes) -> None:
    """An entry without the extra data that version 3 demands gets it."""
    table = struct.unpack_from(">Q", image, 64)[0]
    fields = list(struct.unpack_from(">QIHHIIQII", image, table))
    fields[8] = 8
    names = image[table + 64 : table + 66]
    struct.pack_into(">QIHHIIQII", image, table, *fields)
    image[table + 40 : table + 50] = bytes(8) + names
    result, out = repaired(image)
    assert "Repairing snapshot table entry 0 is incomplete" in result.messages
    assert result.corruptions_fixed == 1 and result.clean
    judged(out, content)


def test_too_much_extra_data_is_cut(image: bytearray) -> None:
    table = struct.unpack_from(">Q", image, 64)[0]
    end = len(image)
    # The record moves to the end of the file, where there is room for 2,000 bytes of extra data.
    record = bytearray(image[table : table + 40]) + bytes(8) + (128 << 10).to_bytes(8, "big") + bytes(1984) + b"1s"
    struct.pack_into(">I", record, 36, 2000)
    image += record + bytes(-len(record) % 512)
    struct.pack_into(">Q", image, 64, end)
    keeper = Disk(MemoryNode(content=bytes(image)))
    with pytest.raises(Exception, match="extra data"):
        images.open_over(keeper.root)
    result = mended(keeper)
    assert result.clean, result.messages
    with images.open_over(keeper.root) as disk:
        assert [(s.id, s.name, s.disk_size) for s in list_snapshots(disk)] == [("1", "s", 128 << 10)]
    keeper.close()


@pytest.mark.parametrize("place", ["count", "length"])
def test_a_snapshot_table_that_goes_too_far_frees_nothing_that_may_be_needed(image: bytearray, place: str) -> None:
    table = struct.unpack_from(">Q", image, 64)[0]
    if place == "count":
        struct.pack_into(">I", image, 60, 60000)
    else:
        struct.pack_into(">H", image, table + 14, 65535)
    before = bytes(image[table : table + 512])
    result, out = repaired(image, "leaks")
    assert result.exit_code != 0
    assert out[table : table + 512] == before
    _, _, block = tables(image)
    assert struct.unpack_from(">H", out, block + 2 * (table // 512))[0] == 1


@pytest.mark.parametrize("repair", ["leaks", "all", "rebuild"])
@pytest.mark.parametrize("field", ["offset", "size"])
def test_what_a_snapshot_that_cannot_be_followed_may_hold_is_not_freed(
    field: str, repair: str, image: bytearray, content: bytes
) -> None:
    """With its entry put right again, by hand, the snapshot is there: nothing was written over what it holds."""
    entry = struct.unpack_from(">Q", image, 64)[0]
    sound = bytes(image[entry : entry + 12])
    image[entry + 7 if field == "offset" else entry + 8] = 0x10
    if repair == "rebuild":
        image[tables(image)[2] + 1] = 0  # the header's cluster has no count
    result, out = repaired(image, "all" if repair == "rebuild" else repair)
    assert result.exit_code == 2 and not result.leaks_fixed
    assert any("snapshots that cannot be found" in line for line in result.messages)
    keeper = Disk(MemoryNode(content=out))
    with images.open_over(keeper.root, writable=True) as disk:
        disk.write(90 << 10, b"w" * (30 << 10))
    data = bytearray(keeper.root.snapshot_bytes())  # type: ignore[attr-defined]
    keeper.close()
    data[entry : entry + 12] = sound
    found = oracle.Image(bytes(data))
    assert found.check().corruptions == []
    assert found.content(found.snapshots[0]) == content.ljust(found.size, b"\0")


@pytest.mark.parametrize("repair", ["leaks", "all"])
def test_features_that_are_not_known_count_no_more_once_something_was_freed(repair: str, image: bytearray) -> None:
    """What an autoclear bit vouches for may lie in what looks lost, also where the repair does not put everything right."""
    image[94] |= 0x40
    image[struct.unpack_from(">Q", image, 64)[0] + 7] = 0x10  # a snapshot's table cannot lie there
    block = tables(image)[2]
    struct.pack_into(">H", image, block + 2 * 200, 1)
    result, out = repaired(image, repair)
    assert result.exit_code == 2
    assert out[94] == 0


# -- images that were not closed


def test_a_dirty_image_is_repaired_when_it_is_opened_for_writing(image: bytearray, content: bytes) -> None:
    struct.pack_into(">Q", image, 72, 1)
    struct.pack_into(">Q", image, 80, 1)
    _, _, block = tables(image)
    image[block + 20 : block + 60] = bytes(40)
    said: list[str] = []
    diagnostics.set_sink(lambda line, _as_tool: said.append(line))
    keeper = Disk(MemoryNode(content=bytes(image)))
    try:
        with images.open_over(keeper.root) as disk:
            assert disk.read(0, 1000) == content[:1000]
        assert said == [], "reading needs no repair"
        with images.open_over(keeper.root, writable=True) as disk:
            assert disk.read(0, 1000) == content[:1000]
            disk.write(0, content[:512])
    finally:
        diagnostics.set_sink(None)
    assert any(line.startswith(("Repairing", "Rebuilding")) for line in said)
    judged(keeper.root.snapshot_bytes(), content)  # type: ignore[attr-defined]
    keeper.close()


def test_a_dirty_image_that_cannot_be_repaired_is_not_written(image: bytearray) -> None:
    struct.pack_into(">Q", image, 72, 1)
    l1, _, _ = tables(image)
    l2 = struct.unpack_from(">Q", image, l1)[0] & damage.OFFSET
    struct.pack_into(">Q", image, l2 + 8, 1 << 63 | 1 << 40)
    keeper = Disk(MemoryNode(content=bytes(image)))
    with pytest.raises(ImageCorrupt) as caught:
        images.open_over(keeper.root, writable=True)
    assert "the file was cut off" in caught.value.message  # a repair would make zeroes of what was lost
    assert keeper.root.snapshot_bytes() == image  # type: ignore[attr-defined]
    keeper.close()


# -- crashes and failures


def hurt(data: bytearray, seed: int) -> bytearray:
    """Return the image with wrong counts and flags, and every other time without a refcount table."""
    rng = random.Random(seed)
    l1, table, block = tables(data)
    out = bytearray(data)
    for _ in range(40):
        struct.pack_into(">H", out, block + 2 * rng.randrange(1, 256), rng.choice((0, 1, 2, 9)))
    for entry in filter(None, struct.unpack_from(">4Q", data, l1)):
        for at in rng.sample(range(0, 512, 8), 10):
            where = (entry & damage.OFFSET) + at
            value = struct.unpack_from(">Q", out, where)[0]
            if value:
                struct.pack_into(">Q", out, where, value ^ 1 << 63)
    if seed % 2:
        struct.pack_into(">Q", out, table, 0)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_a_crash_inside_a_repair_loses_nothing(seed: int, image: bytearray, content: bytes) -> None:
    """Whatever the medium holds then, both states are there, and a second repair comes to its end."""
    recorder = RecorderNode(MemoryNode(content=bytes(hurt(image, seed))), sector=512)
    keeper = Disk(recorder)
    mended(keeper)
    judged(recorder.primary.node.snapshot_bytes(), content)  # type: ignore[union-attr]
    keeper.close()

    def judge(state: replay.CrashState) -> None:
        holder = Disk(state.image)
        result = mended(holder)
        assert result.clean, result.messages[:5]
        judged(state.image.snapshot_bytes(), content)
        holder.close()

    for states in (
        replay.prefixes(recorder.log), replay.torn(recorder.log, (512,)), replay.singles(recorder.log, limit=20),
        replay.sampled(recorder.log, 30),
    ):  # fmt: skip
        replay.replay(states, judge)


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_failing_medium_ends_a_repair_and_loses_nothing(nth: int, image: bytearray, content: bytes) -> None:
    inner = MemoryNode(content=bytes(hurt(image, 1)))
    faults = FaultNode(inner)
    keeper = Disk(faults)
    faults.fail(CHANGES, nth)
    result = mended(keeper)
    assert result.failure is not None or result.clean or result.check_errors
    faults.reset()
    assert mended(keeper).clean
    judged(inner.snapshot_bytes(), content)
    keeper.close()


@pytest.mark.parametrize("repair", [None, "leaks", "all"])
def test_an_open_image_whose_counts_are_postponed_is_sound_and_stays_so(repair: str | None) -> None:
    """What was not written yet is neither damage nor forgotten, and the dirty bit goes on to say that there is such."""
    keeper = Disk(images.create(Shape(lazy=True)))
    with images.open_over(keeper.root, writable=True) as disk:
        disk.write(0, b"a" * 30000)
        images.snapshot_create(disk, "s")
        disk.write(10000, b"b" * 3000)
        result = check_node(disk.root, repair=repair)
        assert (result.exit_code, result.corruptions_fixed, result.leaks_fixed) == (0, 0, 0), result.messages[:3]
        disk.write(40000, b"c" * 9000)
        disk.write(0, b"e" * 5000)
        disk.flush()
        left: bytes = keeper.root.snapshot_bytes()  # type: ignore[attr-defined]
        assert left[79] & 1, "a crash now leaves counts that nobody would look at"
        expected = disk.read(0, disk.size)
    found = oracle.Image(keeper.root.snapshot_bytes())  # type: ignore[attr-defined]
    keeper.close()
    assert found.content() == expected
    assert (found.check().corruptions, found.check().leaks) == ([], [])


# -- with QEMU


@require_qemu
@pytest.mark.parametrize("repair", ["leaks", "all"])
@pytest.mark.parametrize("seed", range(max(1, int(10 * SCALE))))
def test_repairs_are_those_of_qemu(seed: int, repair: str, tmp_path: Path) -> None:
    """Counts, lines and the image afterwards, where QEMU comes to an end; sound counts also where it does not."""
    rng = random.Random(f"repair {seed} {repair} {os.environ.get('COWHAND_SEED', '')}")
    sound, ours, theirs = tmp_path / "sound", tmp_path / "image", tmp_path / "other" / "image"
    theirs.parent.mkdir()
    # QEMU drops the snapshots of images with bitmaps in a repair, and frees snapshot tables that it cannot read to their end.
    damage.make(sound, rng, bitmaps=False)
    for _ in range(8):
        data = bytearray(sound.read_bytes())
        done = damage.damage(data, rng, cut=False, kinds=("L1", "L2", "refcount block"))
        ours.write_bytes(data)
        theirs.write_bytes(data)
        mine, other = damage.our_verdict(ours, repair), damage.qemus_verdict(theirs, repair)
        if other.counts is None:
            assert mine.code != 0 or check(ours, format="qcow2").clean, done
            continue
        assert (mine.code, mine.counts) == (other.code, other.counts), done
        assert mine.lines == other.lines, done
        assert damage.qemus_verdict(ours) == damage.qemus_verdict(theirs), done


@require_qemu
@pytest.mark.parametrize("seed", range(max(1, int(10 * SCALE))))
def test_any_repair_leaves_what_can_be_repaired_again(seed: int, tmp_path: Path) -> None:
    """Also of files that were cut and of damaged snapshot tables: a second repair finds nothing that it could still do."""
    rng = random.Random(f"again {seed} {os.environ.get('COWHAND_SEED', '')}")
    sound, path = tmp_path / "sound", tmp_path / "image"
    damage.make(sound, rng)
    for _ in range(8):
        data = bytearray(sound.read_bytes())
        done = damage.damage(data, rng)
        path.write_bytes(data)
        first = damage.our_verdict(path, "all")
        if first.counts is None:
            continue
        again = damage.our_verdict(path, "all")
        assert again.counts is not None, done
        assert again.counts.get("corruptions", 0) <= first.counts.get("corruptions", 0), done
        if first.code == 0:
            assert again.counts.get("corruptions-fixed", 0) + again.counts.get("leaks-fixed", 0) == 0, done
        assert again.code == damage.qemus_verdict(path).code, done


@require_qemu
def test_snapshots_and_bitmaps_survive_a_repair(tmp_path: Path) -> None:
    """QEMU 7.2 drops the snapshots of such an image when it repairs it."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_io(path, "write -P 1 0 1M", format="qcow2")
    qemu_img("snapshot", "-c", "s", path)
    qemu_img("bitmap", "--add", path, "b")
    qemu_io(path, "write -P 2 0 256k", format="qcow2")
    for repair in ("leaks", "all"):
        result = check(path, repair=repair)
        assert result.clean and not result.leaks_fixed and not result.corruptions_fixed, result.messages
    info = qemu_img("info", "--output=json", path).json()
    assert [s["name"] for s in info["snapshots"]] == ["s"]
    assert [b["name"] for b in info["format-specific"]["data"]["bitmaps"]] == ["b"]
    with cowhand.open(path) as disk, open_snapshot(disk, "s") as view:
        assert view.read(0, 1 << 20) == b"\1" * (1 << 20)
    assert_clean(path)


@require_qemu
def test_a_dirty_image_of_qemu_is_repaired(tmp_path: Path) -> None:
    path, copy = tmp_path / "image", tmp_path / "copy"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    qemu_io(path, "write -P 7 0 300k", "flush", "abort", format="qcow2", check=False)
    shutil.copy(path, copy)
    assert struct.unpack_from(">Q", path.read_bytes(), 72)[0] == 1
    with cowhand.open(path, writable=True) as disk:
        assert disk.read(0, 300 << 10) == b"\7" * (300 << 10)
        disk.write(1 << 20, b"n" * 1000)
    assert_clean(path)
    qemu_img("check", "-r", "all", copy)
    assert_clean(copy)

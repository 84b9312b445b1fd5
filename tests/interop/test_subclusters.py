"""Images with extended L2 entries: cowhand and QEMU write the same ones in turn, read each other's, and say the same of every subcluster."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowhand
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import CowhandError, ImageCorrupt, InvalidArgument
from cowhand.image.create import create
from cowhand.testing.machine import SCALE
from tests.interop.images import VERBS, Request, Shape
from tests.interop.life import Life
from tests.interop.partners import Cowhand, Qemu
from tests.tools.qemu import assert_clean, assert_identical, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


@pytest.mark.parametrize("seed", range(max(1, int(6 * SCALE))))
@pytest.mark.parametrize("cluster", [16384, 65536])
def test_both_programs_live_in_turn(cluster: int, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{cluster} {seed}")
    below: tuple[str, ...] = ((), ("raw",), ("qcow2",))[seed % 3]
    data = "plain" if seed == 3 else ""
    sizes = (1_400_320, 1_800_704)[: len(below) + 1]
    shape = Shape(cluster, 3, rng.choice((16, 32, 64)), "zstd", formats=below, sizes=sizes, extended=True, data=data)
    life = Life(tmp_path, shape, ("cowhand", "qemu")[seed % 2])
    for number in range(3):
        story = [
            Request(rng.choice(VERBS), rng.randrange(1 << 24), rng.randrange(1 << 24), rng.randrange(1, 256))
            for _ in range(25)
        ]
        life.session((("cowhand", "qemu")[(seed + number) % 2], bool(number % 2), story))
    life.judge()


def test_a_write_copies_subclusters_and_no_more(tmp_path: Path) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(random.Random(1).randbytes(1 << 20))
    shape = Shape(65536, formats=("raw",), sizes=(1 << 20, 1 << 20), extended=True)
    Cowhand.create(path, shape, base)
    with cowhand.open(path, writable=True) as disk:
        disk.write(70_000, b"x" * 100)
        disk.write_zeroes(131_072 + 2048, 4096, unmap=True)
    rows = Cowhand(path, shape).map()
    assert rows == Qemu(path, shape).map()
    with cowhand.open(path) as disk:
        own = [(row.start, row.length) for batch in disk.extents() for row in batch if row.depth == 0]
    assert own == [(69_632, 2048), (133_120, 4096)]
    assert_clean(path)


def test_a_run_that_begins_inside_a_cluster_ends_where_the_next_one_differs(tmp_path: Path) -> None:
    """Two adjoining clusters, both data in the first half and zero in the second."""
    path = tmp_path / "disk.qcow2"
    create(path, "qcow2", 1 << 20, {"extended_l2": "on"})
    with cowhand.open(path, writable=True) as disk:
        disk.write(0, b"a" * 131_072)
        disk.write_zeroes(32_768, 32_768)
        disk.write_zeroes(98_304, 32_768)
        assert disk.read(40_000, 40_000) == bytes(25_536) + b"a" * 14_464
        disk.write(40_000, b"b" * 60_000)
        content = (b"a" * 32_768 + bytes(7_232) + b"b" * 60_000).ljust(1 << 20, b"\0")
        assert disk.read(0, 1 << 20) == content
    raw = tmp_path / "raw"
    raw.write_bytes(content)
    assert_identical(path, "qcow2", raw, "raw")
    assert_clean(path)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation_over_a_backing_file_does_not_hide_it(mode: str, tmp_path: Path) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(random.Random(1).randbytes(1 << 20))
    shape = Shape(65536, formats=("raw",), sizes=(1 << 20, 1 << 20), extended=True)
    create(path, "qcow2", 1 << 20, {**shape.options(), "preallocation": mode}, backing="base.raw", backing_format="raw")
    assert_identical(base, "raw", path, "qcow2")
    assert Cowhand(path, shape).map() == Qemu(path, shape).map()
    qemu_io(path, "write -P 9 100k 10k", format="qcow2")
    with cowhand.open(path, writable=True) as disk:
        disk.write(200_000, b"y" * 20_000)
        assert disk.read(102_400, 10_240) == b"\x09" * 10_240
        assert disk.read(300_000, 5000) == base.read_bytes()[300_000:305_000]
    assert_clean(path)


def test_convert_both_ways(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(random.Random(2).randbytes(300_032).ljust(3 << 20, b"\0"))
    for compressed in (False, True):
        path = tmp_path / f"{compressed}.qcow2"
        convert(source, path, "qcow2", options={"extended_l2": "on"}, compressed=compressed)
        assert_clean(path)
        assert_identical(path, "qcow2", source, "raw")
        convert(path, tmp_path / f"{compressed}.raw", "raw")
        assert_identical(tmp_path / f"{compressed}.raw", "raw", source, "raw")


@pytest.mark.parametrize(
    ("entry", "bitmap"),
    [
        (None, 1 << 32 | 1),
        (None, (1 << 64) - 1),
        (0, 1),
        (1 << 63, 1 << 31),
        (1 << 62 | 0x50000, 1),
        (1 << 63 | 0x50200, 1),
    ],
)
def test_bitmaps_that_contradict_themselves_are_damage(entry: int | None, bitmap: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    compressed = bool(
        entry and entry & 1 << 62
    )  # what it holds is read as if the bitmap said nothing; here that is nothing sound
    create(path, "qcow2", 1 << 20, {"extended_l2": "on"})
    with cowhand.open(path, writable=True) as disk:
        disk.write(0, b"a" * 131_072)
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    table = int.from_bytes(image[l1 : l1 + 8], "big") & (1 << 56) - 1
    if entry is not None:
        image[table : table + 8] = entry.to_bytes(8, "big")
    image[table + 8 : table + 16] = bitmap.to_bytes(8, "big")
    path.write_bytes(image)
    shape = Shape(65536, sizes=(1 << 20,), extended=True)
    assert Cowhand(path, shape).check() == Qemu(path, shape).check()
    with cowhand.open(path) as disk:
        assert disk.read(65536, 5) == b"aaaaa"
        with pytest.raises(CowhandError if compressed else ImageCorrupt):
            disk.read(0, 5)
        if not compressed:
            with pytest.raises(CowhandError):
                list(disk.extents())
    with pytest.raises(CowhandError), cowhand.open(path, writable=True) as disk:
        disk.write(0, b"hello")


@pytest.mark.parametrize("bitmap", [1, 1 << 63, (1 << 64) - 1])
def test_a_compressed_cluster_whose_bitmap_says_something_is_read_and_replaced(bitmap: int, tmp_path: Path) -> None:
    source, path = tmp_path / "source.raw", tmp_path / "disk.qcow2"
    source.write_bytes(b"compressible" * 10_000)
    convert(source, path, "qcow2", options={"extended_l2": "on"}, compressed=True)
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    table = int.from_bytes(image[l1 : l1 + 8], "big") & (1 << 56) - 1
    image[table + 8 : table + 16] = bitmap.to_bytes(8, "big")
    path.write_bytes(image)
    shape = Shape(65536, sizes=(120_320,), extended=True)
    assert Cowhand(path, shape).check() == Qemu(path, shape).check()
    with cowhand.open(path, writable=True) as disk:
        assert disk.read(0, 120_000) == source.read_bytes()
        disk.write(700, b"x" * 5000)
        assert disk.read(0, 120_000) == source.read_bytes()[:700] + b"x" * 5000 + source.read_bytes()[5700:]
    qemu_io(path, "read -P 0x78 700 5000", format="qcow2")
    assert_clean(path)


@pytest.mark.parametrize("options", [{"cluster_size": "8k"}, {"compat": "0.10"}])
def test_what_subclusters_do_not_go_with(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        create(tmp_path / "x.qcow2", "qcow2", 1 << 20, {"extended_l2": "on", **options})

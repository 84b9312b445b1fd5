"""Where things lie: files made, and filled by the same requests, are equal byte for byte, so every offset is QEMU's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowhand
from cowhand.image.create import create
from tests.interop.images import pattern
from tests.tools.qemu import assert_clean, assert_identical, qemu_img, qemu_io, qemu_map, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

CLUSTERS = (512, 1024, 4096, 65536, 2 << 20)


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    """Assert that two files are equal, and say where they are not. QEMU fills the last cluster up, which reads the same."""
    a, b = ours.read_bytes(), theirs.read_bytes()
    if a.rstrip(b"\0") == b.rstrip(b"\0"):
        return
    length = min(len(a), len(b))
    differing = [at for at in range(0, length, 512) if a[at : at + 512] != b[at : at + 512]]
    pytest.fail(f"sizes {len(a)} and {len(b)}; sectors that differ: {[hex(at) for at in differing[:12]]}")


def both_create(folder: Path, size: str, options: dict[str, str], backing: str | None = None) -> tuple[Path, Path]:
    """Make the same image by both programs."""
    ours, theirs = folder / "ours", folder / "theirs"
    create(ours, "qcow2", size, options, backing=backing, backing_format="raw" if backing else None)
    chosen = ",".join(f"{name}={value}" for name, value in options.items())
    below = ("-b", backing, "-F", "raw") if backing else ()
    qemu_img("create", "-q", "-f", "qcow2", *(("-o", chosen) if chosen else ()), *below, theirs, size)
    return ours, theirs


def combinations() -> Iterator[tuple[dict[str, str], str]]:
    """Yield options and sizes: each cluster size with each width, and the rest where it makes a difference: a width shows in counts alone."""
    for cluster in CLUSTERS:
        for bits in (1, 2, 4, 8, 16, 32, 64):
            for size in ("0", "512", "3M") if bits == 16 else ("3M",):
                yield {"cluster_size": str(cluster), "refcount_bits": str(bits)}, size
        yield {"cluster_size": str(cluster), "compat": "0.10"}, "5M"
        yield {"cluster_size": str(cluster), "lazy_refcounts": "on"}, "5M"
        yield {"cluster_size": str(cluster), "compression_type": "zstd"}, "5M"
        yield {"cluster_size": str(cluster)}, "1G"
    yield {}, "1T"
    yield {"cluster_size": "2M"}, "64T"
    yield {"cluster_size": "512"}, "128G"


def named(case: tuple[dict[str, str], str]) -> str:
    return "-".join((*case[0].values(), case[1]))


class TestNewImages:
    def test_every_shape(self, tmp_path: Path) -> None:
        for number, (options, size) in enumerate(combinations()):
            folder = tmp_path / str(number)
            folder.mkdir()
            ours, theirs = both_create(folder, size, options)
            try:
                assert_same_bytes(ours, theirs)
            except pytest.fail.Exception as error:
                error.add_note(named((options, size)))
                raise

    @pytest.mark.parametrize("cluster", CLUSTERS)
    @pytest.mark.parametrize("bits", [1, 16, 64])
    @pytest.mark.parametrize("size", ["1M", "1023k", "40M"])
    def test_preallocated_metadata(self, cluster: int, bits: int, size: str, tmp_path: Path) -> None:
        options = {"cluster_size": str(cluster), "refcount_bits": str(bits), "preallocation": "metadata"}
        assert_same_bytes(*both_create(tmp_path, size, options))

    def test_a_refcount_block_for_refcount_blocks(self, tmp_path: Path) -> None:
        """64 clusters to a block: a new block lies where no block counts it yet, over and over."""
        options = {"cluster_size": "512", "refcount_bits": "64", "preallocation": "metadata"}
        assert_same_bytes(*both_create(tmp_path, "70M", options))

    @pytest.mark.parametrize(
        "options", [{}, {"compat": "0.10"}, {"cluster_size": "512"}, {"cluster_size": "2M"}], ids=str
    )
    def test_with_a_backing_file(self, options: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "base").write_bytes(b"b" * 100_000)
        assert_same_bytes(*both_create(tmp_path, "5M", options, "base"))

    @pytest.mark.parametrize("mode", ["falloc", "full"])
    def test_preallocated_data_occupy_their_space(self, mode: str, tmp_path: Path) -> None:
        ours, theirs = both_create(tmp_path, "7M", {"preallocation": mode, "cluster_size": "4096"})
        assert ours.stat().st_blocks * 512 >= 7 << 20
        assert abs(ours.stat().st_blocks - theirs.stat().st_blocks) <= 64
        assert all(row["data"] or row["zero"] for row in qemu_map(ours))
        assert_clean(ours)
        assert_identical(ours, "qcow2", theirs, "qcow2")


def fill(ours: Path, theirs: Path, requests: list[tuple[str, int, int]], sessions: int = 1) -> None:
    """Do the same *requests* by cowhand and by qemu-io, in so many sessions."""
    source = theirs.parent / "pattern"
    source.write_bytes(pattern(1, 4099))
    step = -(-len(requests) // sessions)
    for begin in range(0, len(requests), step):
        part = requests[begin : begin + step]
        commands = []
        with cowhand.open(ours, writable=True, format="qcow2") as disk:
            for verb, offset, length in part:
                if verb == "flush":
                    disk.flush()
                    commands.append("flush")
                elif verb == "zero":
                    disk.write_zeroes(offset, length)
                    commands.append(f"write -q -z {offset} {length}")
                else:
                    disk.write(offset, pattern(1, length))
                    commands.append(f"write -q -s {source} {offset} {length}")
        for first in range(0, len(commands), 500):
            qemu_io(theirs, *commands[first : first + 500], format="qcow2")


SHAPES = [
    {},
    {"cluster_size": "512"},
    {"cluster_size": "512", "refcount_bits": "64"},
    {"cluster_size": "1024", "refcount_bits": "1"},
    {"cluster_size": "4096", "compat": "0.10"},
    {"cluster_size": "4096", "refcount_bits": "32"},
    {"cluster_size": "2M"},
]


@pytest.mark.parametrize("options", SHAPES, ids=lambda options: named((options, "")))
class TestAllocation:
    """The same requests lead to the same file."""

    SIZE = 12 << 20

    def test_sequential(self, options: dict[str, str], tmp_path: Path) -> None:
        ours, theirs = both_create(tmp_path, str(self.SIZE), options)
        fill(ours, theirs, [("write", offset, 65536) for offset in range(0, self.SIZE, 65536)])
        assert_same_bytes(ours, theirs)

    def test_random(self, options: dict[str, str], tmp_path: Path, rng: random.Random) -> None:
        ours, theirs = both_create(tmp_path, str(self.SIZE), options)
        requests = []
        for _ in range(120):
            length = rng.choice((512, 4096, 65536, rng.randrange(1, 200_000)))
            verb = rng.choice(("write", "write", "write", "write", "flush"))
            requests.append((verb, rng.randrange(self.SIZE - length), length))
        fill(ours, theirs, requests, sessions=3)
        assert_same_bytes(ours, theirs)

    def test_over_a_backing_file(self, options: dict[str, str], tmp_path: Path, rng: random.Random) -> None:
        (tmp_path / "base").write_bytes(rng.randbytes(self.SIZE // 2))
        ours, theirs = both_create(tmp_path, str(self.SIZE), options, "base")
        requests = []
        for _ in range(60):
            length = rng.choice((512, 4096, rng.randrange(1, 200_000)))
            requests.append(("write", rng.randrange(self.SIZE - length), length))
        fill(ours, theirs, requests, sessions=2)
        assert_same_bytes(ours, theirs)

    def test_zeroes_and_writes_between_them(self, options: dict[str, str], tmp_path: Path, rng: random.Random) -> None:
        if "compat" in options:
            pytest.skip("QEMU makes empty L2 tables where version 2 has nothing to zero")
        ours, theirs = both_create(tmp_path, str(self.SIZE), options)
        requests = []
        for _ in range(80):
            length = rng.choice((4096, 65536, rng.randrange(1, 300_000)))
            requests.append((rng.choice(("zero", "write")), rng.randrange(self.SIZE - length), length))
        fill(ours, theirs, requests)
        assert_same_bytes(ours, theirs)

    def test_growth(self, options: dict[str, str], tmp_path: Path) -> None:
        ours, theirs = both_create(tmp_path, "1M", options)
        size = 1 << 20
        for step in range(4):
            fill(ours, theirs, [("write", size - 100_000 * step - 1000, 1000)])
            size += 3 << 20
            with cowhand.open(ours, writable=True, format="qcow2") as disk:
                disk.resize(size)
            qemu_img("resize", "-q", "-f", "qcow2", theirs, str(size))
        fill(ours, theirs, [("write", 100, size - 200)])
        assert_same_bytes(ours, theirs)


class TestFreedSpace:
    """Space that was freed in the same session is used again before the file grows by much, and what a shrink frees is given back."""

    def test_discards_of_more_than_some_mib_are_followed_by_writes(self, tmp_path: Path) -> None:
        size, piece = 260 << 20, 10 << 20
        ours, theirs = both_create(tmp_path, str(size), {"cluster_size": "1M", "preallocation": "metadata"})
        end = size - piece
        qemu_io(theirs, f"discard 0 {piece}", f"discard {end} {piece}", f"write {end} {piece}", f"write 0 {piece}")
        with cowhand.open(ours, writable=True, format="qcow2") as disk:
            disk.discard(0, piece)
            disk.discard(end, piece)
            disk.write(end, b"x" * piece)
            disk.write(0, b"x" * piece)
        places = [(row["start"], row["length"], row.get("offset")) for row in qemu_map(ours) if row["data"]]
        assert places == [(row["start"], row["length"], row.get("offset")) for row in qemu_map(theirs) if row["data"]]
        before = ours.stat().st_blocks
        with cowhand.open(ours, writable=True, format="qcow2") as disk:
            disk.resize(5 << 20, shrink=True)
        qemu_img("resize", "-q", "--shrink", "-f", "qcow2", theirs, "5M")
        assert abs(ours.stat().st_blocks - theirs.stat().st_blocks) <= 64
        assert (before - ours.stat().st_blocks) * 512 >= 15 << 20
        assert_clean(ours)

"""Images with an external data file, plain and raw: cowhand and QEMU write the same ones in turn, and read each other's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowhand
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import CowhandError, ImageCorrupt, ImageExists, InvalidArgument, NotSupported, PolicyRefused
from cowhand.image.create import create
from cowhand.testing.machine import SCALE
from tests.interop.images import Request, Shape
from tests.interop.life import Life
from tests.tools.qemu import assert_clean, assert_identical, qemu_img, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

VERBS = ("write",) * 6 + ("zero",) * 3 + ("discard",) * 2 + ("flush", "grow")


@pytest.mark.parametrize("seed", range(max(1, int(3 * SCALE))))
@pytest.mark.parametrize("data", ["plain", "raw"])
@pytest.mark.parametrize("cluster", [512, 65536])
def test_both_programs_live_in_turn(cluster: int, data: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{cluster} {data} {seed}")
    below: tuple[str, ...] = ("raw",) if data == "plain" and seed % 2 else ()
    shape = Shape(
        cluster, 3, rng.choice((1, 16, 64)), formats=below, sizes=(700_416, 900_096)[: len(below) + 1], data=data
    )
    life = Life(tmp_path, shape, ("cowhand", "qemu")[seed % 2])
    for number in range(3):
        story = [
            Request(rng.choice(VERBS), rng.randrange(1 << 24), rng.randrange(1 << 24), rng.randrange(1, 256))
            for _ in range(25)
        ]
        # Discards that are handed down make a raw data file differ from the disk, in QEMU as well.
        life.session((("cowhand", "qemu")[(seed + number) % 2], data == "plain" and bool(number % 2), story))
    life.judge()


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_a_raw_data_file_reads_like_the_disk(mode: str, tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    create(path, "qcow2", 1 << 20, {"data_file": str(data), "data_file_raw": "on", "preallocation": mode})
    if mode in ("falloc", "full"):
        assert data.stat().st_blocks * 512 >= 1 << 20
    with cowhand.open(path, writable=True) as disk:
        disk.write(70_000, b"x" * 300_000)
        disk.write_zeroes(100_000, 130_000, unmap=True)
        disk.write_zeroes(200_001, 77)
    assert_identical(path, "qcow2", data, "raw")
    assert_clean(path)
    with cowhand.open(path, writable=True) as disk:
        disk.resize(2 << 20)
        disk.write((2 << 20) - 5, b"hello")
    assert data.stat().st_size == 2 << 20
    assert_identical(path, "qcow2", data, "raw")


def test_an_existing_data_file_is_kept_when_that_is_asked_for_and_never_lost_by_accident(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    content = random.Random(1).randbytes(1 << 20)
    data.write_bytes(content)
    with pytest.raises(ImageExists):
        create(path, "qcow2", 1 << 20, {"data_file": str(data)})
    with pytest.raises(InvalidArgument):
        create(path, "qcow2", 1 << 20, {"data_file": str(data), "compat": "0.10"}, overwrite=True)
    with pytest.raises(InvalidArgument):
        create(data, "qcow2", 1 << 20, {"data_file": str(data)}, overwrite=True)
    assert data.read_bytes() == content
    assert not path.exists()
    create(path, "qcow2", 1 << 20, {"data_file": str(data), "data_file_raw": "on", "keep_data_file": "on"})
    assert data.read_bytes() == content
    assert_identical(path, "qcow2", data, "raw")
    with cowhand.open(path) as disk:
        assert disk.read(0, 1 << 20) == content


def test_convert_into_an_image_with_a_data_file(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(random.Random(2).randbytes(300_032).ljust(3 << 20, b"\0"))
    for raw in ("off", "on"):
        path, data = tmp_path / f"{raw}.qcow2", tmp_path / f"{raw}.data"
        convert(source, path, "qcow2", options={"data_file": str(data), "data_file_raw": raw})
        assert_clean(path)
        assert_identical(path, "qcow2", source, "raw")
    with pytest.raises(NotSupported):
        convert(source, tmp_path / "c.qcow2", "qcow2", options={"data_file": str(tmp_path / "c")}, compressed=True)


@pytest.mark.parametrize("name", ['json:{"driver":"null-co"}', "nbd://127.0.0.1/x", "file:secret", "blkdebug::secret"])
def test_the_header_names_a_plain_file_whatever_the_name_looks_like(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret".ljust(65536, b"\0"))
    path = _naming(tmp_path, name)
    with pytest.raises(FileNotFoundError):
        cowhand.open(path)
    with pytest.raises(PolicyRefused):
        cowhand.open(path, policy=cowhand.block.opening.policy.UNTRUSTED)
    # A description needs none of it.
    with cowhand.open(path, backing=False) as disk:
        assert disk.root.format_specific()["data-file"] == name
        with pytest.raises(NotSupported):
            disk.read(0, 10)


def test_a_data_file_outside_of_the_allowed_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(65536))
    path = _naming(tmp_path, str(tmp_path / "secret"))
    policy = cowhand.block.opening.policy.DEFAULT.within(str(tmp_path / "in"))
    with pytest.raises(PolicyRefused):
        cowhand.open(path, policy=policy)
    cowhand.open(path, policy=policy._replace(directories=(str(tmp_path),))).close()
    given = {"driver": "qcow2", "file.filename": str(path), "data-file.filename": str(tmp_path / "secret")}
    cowhand.open(given, policy=policy).close()  # what the user names is the user's choice


def _naming(folder: Path, name: str) -> Path:
    path = folder / "hostile.qcow2"
    create(path, "qcow2", 65536, {"data_file": str(folder / "x")})
    with cowhand.open(path, writable=True) as disk:
        disk.write(0, b"data")
        disk.root.amend({"data_file": name})  # type: ignore[attr-defined]
    (folder / "x").unlink()
    return path


def test_a_failed_flush_of_the_data_file_keeps_the_tables_back(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    create(path, "qcow2", 1 << 20, {"data_file": str(data)})
    with cowhand.open(path, writable=True) as disk:
        disk.write(0, b"a" * 65536)
    before = path.read_bytes()
    faulty = {
        "driver": "qcow2", "file.filename": str(path), "data-file.driver": "blkdebug", "data-file.image.filename": str(data),
        "data-file.inject-error.0.event": "none", "data-file.inject-error.0.iotype": "flush",
    }  # fmt: skip
    disk = cowhand.open(faulty, writable=True)
    disk.write(131072, b"b" * 65536)
    with pytest.raises(CowhandError):
        disk.flush()
    assert path.read_bytes() == before
    with pytest.raises(CowhandError):
        disk.close()


def test_entries_that_name_another_place_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, "qcow2", 1 << 20, {"data_file": str(tmp_path / "data"), "data_file_raw": "on"})
    image = bytearray(path.read_bytes())
    table = int.from_bytes(image[0x30000:0x30008], "big") & (1 << 56) - 1
    for entry in (1 << 63 | 0x50000, 1 << 62 | 0x50000, 1 << 63 | 0x20200):
        image[table + 16 : table + 24] = entry.to_bytes(8, "big")
        path.write_bytes(image)
        with cowhand.open(path) as disk:
            assert disk.read(0x10000, 5) == bytes(5)
            with pytest.raises(ImageCorrupt):
                disk.read(0x20000, 5)
        with cowhand.open(path, writable=True) as disk, pytest.raises(ImageCorrupt):
            disk.write(0x20000, b"hello")
        assert (tmp_path / "data").read_bytes() == bytes(1 << 20)


def test_qemu_shrinks_and_grows_what_cowhand_made(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    create(path, "qcow2", 1 << 20, {"data_file": str(data)})
    qemu_io(path, "write -P 5 0 1M", format="qcow2")
    with cowhand.open(path, writable=True) as disk:
        disk.resize(300_032, shrink=True)
    assert data.stat().st_size == 300_032
    qemu_img("resize", "-f", "qcow2", path, "2M")
    with cowhand.open(path) as disk:
        assert disk.read(0, 2 << 20) == (b"\5" * 300_032).ljust(2 << 20, b"\0")
    assert_clean(path)

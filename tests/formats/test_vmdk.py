"""VMware's disks: sub-formats that qemu-img makes are read, written where that can be, and made."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import DEFAULT, UNTRUSTED
from cowhand.core.errors import ImageExists, InvalidFormat, NotSupported, PolicyRefused
from cowhand.drivers import REGISTRY
from tests.formats.contracts import KIB, MIB, QemuReads, QemuWrites, make, round_trip
from tests.tools.qemu import qemu_img, qemu_info, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]


class TestReadingSparse(QemuReads):
    driver = "vmdk"
    size = 40 * MIB + 64 * KIB

    def metadata(self, image: Path) -> list[tuple[int, int]]:
        return [(0, 128 * KIB), (0, 512)]


class TestReadingStream(QemuReads):
    driver = "vmdk"
    options = "subformat=streamOptimized"

    def metadata(self, image: Path) -> list[tuple[int, int]]:
        return [(0, 512), (0, image.stat().st_size)]


class TestReadingFlat(QemuReads):
    driver = "vmdk"
    options = "subformat=monolithicFlat"


class TestReadingPieces(QemuReads):
    driver = "vmdk"
    options = "subformat=twoGbMaxExtentSparse"


class TestWritingSparse(QemuWrites):
    driver = "vmdk"


class TestWritingSparseWithZeroes(QemuWrites):
    driver = "vmdk"
    options = "subformat=monolithicSparse,zeroed_grain=on"


class TestWritingFlat(QemuWrites):
    driver = "vmdk"
    options = "subformat=twoGbMaxExtentFlat"


SPLIT = ["subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse", "subformat=twoGbMaxExtentFlat"]


@pytest.mark.parametrize("options", ["", "zeroed_grain=on", *SPLIT])
@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 70 * MIB])
def test_round_trips(tmp_path: Path, size: int, options: str) -> None:
    round_trip(tmp_path, size, "vmdk", options)


@pytest.mark.parametrize("kind", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized", "monolithicFlat"])
def test_several_extents(tmp_path: Path, kind: str) -> None:
    image, back = tmp_path / "big.vmdk", tmp_path / "back.raw"
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(5 << 30)
        for offset in (0, (2 << 30) - (2 << 20), (5 << 30) - 4096):
            file.seek(offset)
            file.write(b"piece" * 800)
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", raw, image)
    cowhand.convert(image, back, "raw")
    assert cowhand.compare(raw, back).identical


def test_extents_obey_the_policy(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    image = make(folder, b"secret" * 10240 + bytes(4096), "vmdk", "subformat=monolithicFlat")
    with pytest.raises(PolicyRefused):
        Opening(REGISTRY, UNTRUSTED).open(str(image))
    inside = DEFAULT.within(str(folder))
    with Disk(Opening(REGISTRY, inside).open(str(image), options={"read-only": True})) as disk:
        assert disk.read(0, 6) == b"secret"
    (folder / "disk-flat.vmdk").rename(tmp_path / "outside")
    for name in ("../outside", str(tmp_path / "outside"), "link"):
        if name == "link":
            (folder / "link").symlink_to(tmp_path / "outside")
        text = image.read_text().replace("disk-flat.vmdk", name)
        image.with_name("hostile.vmdk").write_text(text)
        with pytest.raises(PolicyRefused):
            Opening(REGISTRY, inside).open(str(folder / "hostile.vmdk"), options={"read-only": True})


def test_extents_are_made_and_refused_where_something_has_their_names(tmp_path: Path) -> None:
    image = tmp_path / "big.vmdk"
    cowhand.create(image, "vmdk", 5 << 30, {"subformat": "twoGbMaxExtentSparse"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "big-s001.vmdk",
        "big-s002.vmdk",
        "big-s003.vmdk",
        "big.vmdk",
    ]
    assert qemu_info(image, "vmdk")["virtual-size"] == 5 << 30
    with cowhand.open(image, writable=True) as disk:
        disk.write((2 << 30) - 3, b"across")
    qemu_io(image, "read -P 0x61 2147483645 1", "read -P 0x73 2147483650 1", format="vmdk")
    image.unlink()
    before = (tmp_path / "big-s002.vmdk").read_bytes()
    with pytest.raises(ImageExists, match="big-s001"):
        cowhand.create(image, "vmdk", 5 << 30, {"subformat": "twoGbMaxExtentSparse"})
    assert not image.exists()
    assert (tmp_path / "big-s002.vmdk").read_bytes() == before


def test_an_overlay_of_ours_is_one_for_qemu(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    make(tmp_path, content, "vmdk")
    top = tmp_path / "top.vmdk"
    cowhand.create(top, "vmdk", backing="disk.vmdk", backing_format="vmdk")
    with cowhand.open(top, writable=True) as disk:
        disk.write(100, b"over")
    qemu_img("convert", "-f", "vmdk", "-O", "raw", top, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == content[:100] + b"over" + content[104:]
    with pytest.raises(NotSupported, match="Flat image"):
        cowhand.create(
            tmp_path / "flat.vmdk",
            "vmdk",
            None,
            {"subformat": "monolithicFlat"},
            backing="disk.vmdk",
            backing_format="vmdk",
        )


def overlay_of(folder: Path, content: bytes) -> Path:
    make(folder, content, "vmdk")
    qemu_img("create", "-f", "vmdk", "-b", folder / "disk.vmdk", "-F", "vmdk", folder / "top.vmdk")
    return folder / "top.vmdk"


def test_a_parent_shows_through_and_is_told_when_it_was_changed(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    top = overlay_of(tmp_path, content)
    qemu_io(top, "write -P 7 65536 512", format="vmdk")
    with cowhand.open(top, writable=True) as disk:
        assert disk.read(0, 65536) == content[:65536]
        assert disk.read(65536, 512) == b"\x07" * 512
        assert disk.read(66048, 4096) == content[66048:70144]
        disk.write(200_000, b"new")
        assert disk.read(199_000, 2000) == content[199_000:200_000] + b"new" + content[200_003:201_000]
    qemu_io(tmp_path / "disk.vmdk", "write -P 1 0 512", format="vmdk")
    with cowhand.open(top) as disk:
        assert disk.read(65536, 512) == b"\x07" * 512  # its own
        with pytest.raises(InvalidFormat, match="was changed since"):
            disk.read(0, 512)
    with pytest.raises(InvalidFormat, match="was changed since"):
        cowhand.convert(top, tmp_path / "out.raw", "raw")


def test_a_stream_is_not_written_in_place(tmp_path: Path) -> None:
    image = make(tmp_path, bytes(65536), "vmdk", "subformat=streamOptimized")
    with pytest.raises(NotSupported, match="cannot be changed"):
        cowhand.open(image, writable=True)


@pytest.mark.parametrize("cid", ["b079769", "1b079769"])
def test_after_a_commit_the_overlay_shows_the_base_as_it_is_then(tmp_path: Path, cid: str) -> None:
    make(tmp_path, b"a" * MIB, "vmdk")
    base = tmp_path / "disk.vmdk"
    data = bytearray(base.read_bytes())
    at = data.index(b"\nCID=") + 5
    end = data.index(b"\n", at)
    text = data[512 : 512 + 10240].rstrip(b"\0")
    data[512 : 512 + 10240] = (text[: at - 512] + cid.encode() + text[end - 512 :]).ljust(10240, b"\0")
    base.write_bytes(data)
    top = tmp_path / "top.vmdk"
    qemu_img("create", "-f", "vmdk", "-b", "disk.vmdk", "-F", "vmdk", top)
    qemu_io(top, "write -P 2 0 64k", format="vmdk")
    cowhand.commit(top, force=True)
    qemu_io(top, "read -P 2 0 64k", "read -P 0x61 64k 64k", format="vmdk")
    with cowhand.open(top) as disk:
        assert disk.read(0, 4) + disk.read(65536, 4) == b"\2\2\2\2aaaa"
    changed = base.read_bytes()
    assert cid.encode() + b"\n" not in changed[:8192]

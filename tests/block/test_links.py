"""What images of each format name in their headers, read without opening anything else."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest

from cowhand.block.links.reading import (
    images_of_loop,
    is_broken,
    local_targets,
    read_links,
    reads_through,
    refuse_loop,
)
from cowhand.block.links.records import BACKING, DATA_FILE, EXTENT, Link
from cowhand.core.errors import ChainLoop, CowhandError, InvalidFormat, SearchIncomplete
from cowhand.core.identity import identify
from cowhand.drivers import REGISTRY
from cowhand.image.create import create
from tests.tools.qemu import qemu_img, require_qemu

MiB = 1 << 20


def names(path: Path) -> list[tuple[str, str, str | None]]:
    return [(link.role, link.name, link.format) for link in read_links(str(path), REGISTRY).links]


@require_qemu
@pytest.mark.parametrize("format", ["qcow2", "qcow", "qed", "vmdk"])
def test_the_backing_file_of_images_that_qemu_made(tmp_path: Path, format: str) -> None:
    base_format = "vmdk" if format == "vmdk" else "raw"
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", base_format, base, "1M")
    assert names(base) == []
    qemu_img("create", "-q", "-f", format, "-b", base, "-F", base_format, top)
    (found,) = names(top)
    assert found[:2] == (BACKING, str(base))
    assert read_links(str(top), REGISTRY).format == format


@require_qemu
@pytest.mark.parametrize("format", ["qcow2", "qcow", "qed", "vmdk", "vpc", "vhdx", "vdi", "parallels", "raw", "luks"])
def test_images_that_stand_alone_name_nothing(tmp_path: Path, format: str) -> None:
    path = tmp_path / "image"
    secret = ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"] if format == "luks" else []
    qemu_img("create", "-q", "-f", format, *secret, path, "1M")
    assert names(path) == []


@require_qemu
def test_extents_and_data_files_count(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, "1M")
    assert names(path) == [(EXTENT, "disk-flat.vmdk", None)]
    qcow2 = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", qcow2, "1M")
    assert names(qcow2) == [(DATA_FILE, f"{tmp_path}/data", "raw")]


def test_the_parent_of_a_differencing_vhd(tmp_path: Path) -> None:
    footer = bytearray(512)
    footer[:8] = b"conectix"
    footer[16:24] = (512).to_bytes(8, "big")
    footer[60:64] = (4).to_bytes(4, "big")
    header = bytearray(1024)
    header[:8] = b"cxsparse"
    header[64:128] = "parent.vhd".encode("utf-16-be").ljust(64, b"\0")
    relative = ".\\folder\\parent.vhd".encode("utf-16-le")
    header[576:600] = b"W2ru" + b"\0\0\2\0" + len(relative).to_bytes(4, "big") + bytes(4) + (1536).to_bytes(8, "big")
    path = tmp_path / "a.vhd"
    path.write_bytes(footer + header + relative.ljust(512, b"\0") + footer)
    assert [name for _, name, _ in names(path)] == ["folder/parent.vhd", "parent.vhd"]
    footer[16:24] = (1 << 40).to_bytes(8, "big")
    path.write_bytes(footer)
    with pytest.raises(InvalidFormat):
        names(path)


def test_the_parent_of_a_differencing_vhdx(tmp_path: Path) -> None:
    data = bytearray(2 * MiB)
    data[:8] = b"vhdxfile"
    at = 192 << 10
    data[at : at + 4], data[at + 8 : at + 12] = b"regi", (1).to_bytes(4, "little")
    region = (
        UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le + MiB.to_bytes(8, "little") + MiB.to_bytes(4, "little")
    )
    data[at + 16 : at + 16 + len(region)] = region
    data[MiB : MiB + 12] = b"metadata\0\0" + (1).to_bytes(2, "little")
    key, value = "relative_path".encode("utf-16-le"), "..\\base.vhdx".encode("utf-16-le")
    locator = bytes(18) + (1).to_bytes(2, "little")
    locator += (32).to_bytes(4, "little") + (32 + len(key)).to_bytes(4, "little")
    locator += len(key).to_bytes(2, "little") + len(value).to_bytes(2, "little") + key + value
    entry = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
    entry += (65536).to_bytes(4, "little") + len(locator).to_bytes(4, "little")
    data[MiB + 32 : MiB + 32 + len(entry)] = entry
    data[MiB + 65536 : MiB + 65536 + len(locator)] = locator
    path = tmp_path / "a.vhdx"
    path.write_bytes(data)
    assert names(path) == [(BACKING, "../base.vhdx", "vhdx")]
    path.write_bytes(data[:100])
    with pytest.raises(InvalidFormat):
        names(path)


def test_every_format_that_stands_on_others_has_a_reader(tmp_path: Path) -> None:
    """A driver whose images record a backing file, and no reader of links, would let its base be overwritten."""
    base = tmp_path / "base"
    create(base, "raw", MiB)
    made = []
    for entry in REGISTRY:
        options = [option.name for option in getattr(entry.load(), "create_options", ())]
        if entry.kind != "format" or "backing_file" not in options:
            continue
        path = tmp_path / f"over.{entry.name}"
        try:
            create(path, entry.name, MiB, backing=str(base), backing_format="raw")
        except CowhandError:
            continue  # QEMU's own are looked at above
        assert [name for role, name, _ in names(path) if role == BACKING] == [str(base)], entry.name
        made.append(entry.name)
    assert "qcow2" in made


@pytest.mark.parametrize("seed", range(60))
def test_damaged_headers_end_in_an_error_or_in_links(tmp_path: Path, seed: int) -> None:
    import random

    rng = random.Random(seed)
    path = tmp_path / "image"
    heads = (b"QFI\xfb\0\0\0\3", b"QED\0", b"KDMV\1\0\0\0", b"# Disk DescriptorFile\n", b"conectix", b"vhdxfile")
    data = bytearray(rng.choice(heads)).ljust(600, b"\0")
    for _ in range(rng.randrange(1, 200)):
        data[rng.randrange(8, len(data))] = rng.choice((0, 1, 2, 4, 0x7F, 0xFF))
    path.write_bytes(data)
    try:
        found = names(path)
    except CowhandError:
        return
    assert all(len(name) < 2000 for _, name, _ in found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/abs/base", ["/abs/base"]),
        ("base", ["/dir/base"]),
        ("file:/abs/base", ["/abs/base"]),
        ("nbd://host/base", []),
        ("json:{", []),
        ('json:{"driver": "nbd", "host": "h", "export": "base"}', []),
        ('json:{"file": {"driver": "host_device", "filename": "/dev/vg/base"}}', ["/dev/vg/base"]),
        ("json:{'file.filename': '/abs/base'}", ["/abs/base"]),
        ('json:{"driver": "raw", "file": {"driver": "quorum", "children": [{"filename": "/a"}, {"file": {"filename": "/b"}}]}}', ["/a", "/b"]),
        ('json:{"file.filename": "base"}', ["base", "/dir/base"]),
    ],
)  # fmt: skip
def test_local_files_that_a_name_means(name: str, expected: list[str]) -> None:
    assert local_targets("/dir/image", Link(BACKING, name)) == expected


def chain(folder: Path, *names: str) -> list[Path]:
    """Make a chain of images, the base first."""
    made: list[Path] = []
    for name in names:
        path = folder / name
        (folder / name).parent.mkdir(exist_ok=True)
        if made:
            create(path, "qcow2", backing=os.path.relpath(made[-1], path.parent), backing_format="qcow2")
        else:
            create(path, "qcow2", MiB)
        made.append(path)
    return made


def test_loops_are_found_by_any_name(tmp_path: Path) -> None:
    base, middle, top = chain(tmp_path, "base", "sub/middle", "top")
    (tmp_path / "link").symlink_to(top)
    os.link(middle, tmp_path / "hard")
    for name in ("base", "./sub/../base", "top", "link", f"file:{middle}", f'json:{{"file": {{"filename": "{top}"}}}}'):
        with pytest.raises(ChainLoop):
            refuse_loop(str(base), Link(BACKING, name), REGISTRY, force=True)
    for name in ("base", "sub/middle", "nbd://host/x", "absent"):
        refuse_loop(str(top), Link(BACKING, name), REGISTRY)
    # As raw, the bytes of an image lead nowhere; but to itself.
    assert not reads_through(Link(BACKING, "top", "raw"), str(base), str(base), REGISTRY)
    assert reads_through(Link(BACKING, "base", "raw"), str(base), str(base), REGISTRY)


def test_an_image_that_does_not_exist_yet_is_known_by_its_name(tmp_path: Path) -> None:
    create(tmp_path / "a", "qcow2", MiB, backing="b", backing_format="qcow2", open_backing=False)
    for name in ("a", "b", "./b"):
        with pytest.raises(ChainLoop):
            refuse_loop(str(tmp_path / "b"), Link(BACKING, name), REGISTRY)


def test_what_cannot_be_read_may_be_a_loop(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    data = bytearray(top.read_bytes())
    data[16:20] = b"\xff" * 4
    top.write_bytes(data)
    with pytest.raises(SearchIncomplete):
        refuse_loop(str(base), Link(BACKING, "top"), REGISTRY)
    refuse_loop(str(base), Link(BACKING, "top"), REGISTRY, force=True)


def test_images_of_a_loop_and_broken_chains(tmp_path: Path) -> None:
    base, middle, top = chain(tmp_path, "base", "middle", "top")
    assert images_of_loop(str(top), REGISTRY) == []
    assert not is_broken(str(top), REGISTRY)
    with open(base, "r+b") as file:  # by hand: no tool does it
        create(tmp_path / "loop", "qcow2", MiB, backing="middle", backing_format="qcow2")
        file.write((tmp_path / "loop").read_bytes())
    assert set(images_of_loop(str(base), REGISTRY)) == {identify(base), identify(middle)}
    assert images_of_loop(str(top), REGISTRY) == []
    assert is_broken(str(top), REGISTRY)
    base.unlink()
    assert is_broken(str(middle), REGISTRY)

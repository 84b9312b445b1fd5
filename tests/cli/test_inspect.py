"""``cowhand inspect``: the inside of an image, and verdicts on images from strangers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cowhand.image.untrusted import judge
from tests.cli.command import cowhand
from tests.cli.images import MiB, fill, image
from tests.hostile import cases


def codes(path: Path, format: str | None = None) -> set[str]:
    return {reason.code for reason in judge(str(path), format).reasons}


@pytest.fixture
def path(image_dir: Path) -> Path:
    image(image_dir / "a")
    fill(image_dir / "a", 0, MiB, 1)
    return image_dir / "a"


def test_header_and_tables(path: Path) -> None:
    document = cowhand("inspect", "--output", "json", path).json()
    assert document["header"]["cluster-bits"] == 16
    assert [row["what"] for row in document["regions"][:3]] == ["qcow2_header", "refcount table", "refcount block"]
    assert "refcount table" in cowhand("inspect", path).stdout


def test_a_sound_image_is_safe(path: Path) -> None:
    assert "nothing is wrong" in cowhand("inspect", "--untrusted", path).stdout
    assert cowhand("inspect", "--untrusted", "--output", "json", path).json()["verdict"] == "sound"
    done = cowhand("inspect", "--untrusted", "--max-size", "1M", path, status=8)
    assert "longer than" in done.stdout
    cowhand("convert", "--untrusted", "-O", "raw", path, path.parent / "copy")
    assert (path.parent / "copy").stat().st_size == judge(str(path)).size


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("base.raw", {"external-reference", "unrecorded-format"}),
        ("/etc/passwd", {"external-reference", "unrecorded-format", "absolute-path"}),
        ("../../secret", {"external-reference", "unrecorded-format", "parent-path"}),
        ("nbd://host/x", {"external-reference", "unrecorded-format", "protocol"}),
        (
            'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}',
            {"external-reference", "unrecorded-format", "json-name", "absolute-path"},
        ),
    ],
)
def test_references(path: Path, name: str, wanted: set[str]) -> None:
    data = bytearray(path.read_bytes())
    data[8:20] = struct.pack(">QI", 0x1000, len(name))
    data[0x1000 : 0x1000 + len(name)] = name.encode()
    path.write_bytes(data)
    assert codes(path) - {"absolute-path"} == wanted - {"absolute-path"}
    assert wanted <= codes(path)
    target = path.parent / "copy"
    assert "is not safe" in cowhand("convert", "--untrusted", "-O", "raw", path, target, status=1).stderr
    assert not target.exists()


def test_formats_that_are_doubtful(path: Path) -> None:
    raw = path.parent / "raw"
    raw.write_bytes(bytes(1 << 20))
    assert codes(raw) == {"guessed-format"}
    assert codes(raw, "raw") == set()
    assert "ambiguous-format" in codes(path, "raw")
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(b"conectix".ljust(512, b"\0"))
    assert "ambiguous-format" in codes(path)


def test_no_regular_file(image_dir: Path) -> None:
    assert codes(image_dir) == {"not-a-file"}
    assert codes(Path("/dev/zero")) == {"not-a-file"}


def test_tables_over_one_another_and_bombs(path: Path) -> None:
    data = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    (block,) = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 48)[0])
    struct.pack_into(">Q", data, l1, block | 1 << 63)
    path.write_bytes(data)
    assert {"damaged", "overlap"} <= codes(path)
    # One cluster of data, named by all of an L2 table, which all of the L1 table names.
    image(path.parent / "bomb", size=64 << 30)
    fill(path.parent / "bomb", 0, 65536, 1)
    data = bytearray((path.parent / "bomb").read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    entry = struct.unpack_from(">Q", data, l1)[0]
    table = entry & ((1 << 56) - 512)
    data[table : table + 65536] = data[table : table + 8] * 8192
    data[l1 : l1 + 128 * 8] = struct.pack(">Q", entry) * 128
    (path.parent / "bomb").write_bytes(data)
    assert "decompression-bomb" in codes(path.parent / "bomb")


def test_whatever_a_file_says_there_is_a_verdict(tmp_path: Path) -> None:
    sound = 0
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        verdict = judge(str(cases.build(f"mutation/{number}", folder).path))
        assert all(reason.text for reason in verdict.reasons)
        sound += verdict.sound
    assert sound < 60, "most of these are damaged"

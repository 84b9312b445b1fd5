"""``cowhand map``: the same stretches as qemu-img tells, as lines, JSON, bar and picture."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

import cowhand as library
from tests.cli.command import cowhand
from tests.cli.images import MiB, fill, image
from tests.tools.qemu import qemu_map, require_qemu


@pytest.fixture
def folder(image_dir: Path) -> Path:
    """Return the folder of base ← work, with data, zeroes and nothing in them."""
    base = image(image_dir / "base")
    work = image(image_dir / "work", backing=base)
    fill(base, 0, 2 * MiB, 1)
    fill(work, MiB, MiB, 2)
    with library.open(work, writable=True) as disk:
        disk.write_zeroes(4 * MiB, MiB)
    return image_dir


@require_qemu
def test_json_is_that_of_qemu_img_and_the_files(folder: Path) -> None:
    rows = cowhand("map", "--output", "json", folder / "work").json()
    assert {row.pop("filename") for row in rows if "filename" in row} == {str(folder / "work"), str(folder / "base")}
    theirs = qemu_map(folder / "work")
    assert [{name: row[name] for name in theirs[0] if name in row} for row in rows] == theirs


def test_lines_tell_kind_layer_and_place(folder: Path) -> None:
    lines = [line.split() for line in cowhand("map", "work", cwd=folder).stdout.splitlines()]
    assert lines[0] == ["start", "length", "kind", "layer", "offset", "file"]
    assert [(row[0], row[1], row[2], row[3], row[5:]) for row in lines[1:]] == [
        ("0x0", "0x100000", "data", "1", ["base"]),
        ("0x100000", "0x100000", "data", "0", ["work"]),
        ("0x200000", "0x200000", "unallocated", "1", []),
        ("0x400000", "0x100000", "zero", "0", []),
        ("0x500000", "0x300000", "unallocated", "1", []),
    ]


def test_a_part_of_the_disk(folder: Path) -> None:
    rows = cowhand("map", "--output", "json", "-s", "1M", "-l", "512k", "work", cwd=folder).json()
    assert [(row["start"], row["length"], row["depth"]) for row in rows] == [(MiB, MiB // 2, 0)]
    assert "the disk ends" in cowhand("map", "-s", "1G", "work", cwd=folder, status=1).stderr
    assert cowhand("map", "--output", "json", "-s", "8M", "work", cwd=folder).json() == []


def test_bar_shows_layers_and_sizes(folder: Path) -> None:
    text = cowhand("map", "--bar", "work", cwd=folder).stdout
    lines = text.splitlines()
    assert [line[:9].strip() for line in lines[2:6]] == ["0", "2 MiB", "4 MiB", "6 MiB"]
    drawn = "".join(line[10:] for line in lines[2:6])
    assert drawn.count("1") == drawn.count("0") == drawn.count("z") == len(drawn) // 8
    legend = [line.split(maxsplit=5) for line in lines[7:]]
    assert legend[0] == ["0", "1", "MiB", "12", "%", "work"]
    assert legend[-1] == ["·", "5", "MiB", "62", "%", "never written"]


def test_on_a_terminal_the_bar_is_drawn_in_colour(folder: Path) -> None:
    text = cowhand("map", "work", cwd=folder, FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="100").stdout
    assert "█" in text and "░" in text and "\x1b[38;5;" in text
    assert "█" not in cowhand("map", "--extents", "work", cwd=folder, FORCE_COLOR="1", TERM="xterm-256color").stdout


def test_picture(folder: Path) -> None:
    assert cowhand("map", "--svg", "map.svg", "work", cwd=folder).stdout == "wrote map.svg\n"
    text = "".join(ElementTree.parse(folder / "map.svg").getroot().itertext())
    assert all(word in text for word in ("work", "base", "zeroes, nothing stored", "never written", "1 MiB · 12 %"))
    themed = cowhand("map", "--svg", "-", "--theme", "dark", "work", cwd=folder).stdout
    assert "prefers-color-scheme" not in themed
    assert cowhand("map", "--svg", "two.svg", "--output", "json", "work", cwd=folder).json() == {"svg": "two.svg"}


def test_mapping_changes_nothing(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("work", "base")}
    cowhand("map", "work", cwd=folder)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_raw_disk(image_dir: Path) -> None:
    with open(image_dir / "a", "wb") as file:
        file.write(b"x" * MiB)
        file.truncate(3 * MiB)
    rows = cowhand("map", "-f", "raw", "--output", "json", "a", cwd=image_dir).json()
    assert [(row["start"], row["length"], row["data"]) for row in rows] == [(0, MiB, True), (MiB, 2 * MiB, False)]

"""The tree of images: who stands on whom, whatever the names look like, and nothing opened that a header names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cowhand.block.formats.qcow2.ondisk.header import Header
from cowhand.chain import tree
from cowhand.chain.tree import Tree


def overlay(path: Path, backing: str | None = None, cluster_bits: int = 16) -> Path:
    """Write the header of an image over *backing*; that is all that a scan reads."""
    header = Header()
    header.size = 1 << 30
    header.cluster_bits = cluster_bits
    header.l1_size = 2
    header.l1_offset = 3 << cluster_bits
    header.refcount_table_offset = 1 << cluster_bits
    header.refcount_table_clusters = 1
    header.backing_name = backing
    header.backing_format = "qcow2" if backing else None
    path.write_bytes(header.encode())
    return path


def names(found: list[tree.Reference]) -> list[str]:
    return [os.path.basename(reference.path) for reference in found]


def test_direct_overlays_and_descendants(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base")
    overlay(tmp_path / "b", "base")
    overlay(tmp_path / "a", "base")
    overlay(tmp_path / "aa", "a")
    overlay(tmp_path / "stranger", "elsewhere")
    (tmp_path / "text").write_text("no image")
    scanned = Tree([tmp_path])
    assert names(scanned.overlays(base)) == ["a", "b"]
    assert names(scanned.descendants(base)) == ["a", "b", "aa"]
    assert scanned.overlays(tmp_path / "aa") == []
    assert scanned.unreadable == []


@pytest.mark.parametrize(
    "name",
    [
        "base",
        "./base",
        "{folder}/base",
        "file:{folder}/base",
        "link",
        "hard",
        'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{folder}/base"}}}}',
        'json:{{"file.filename": "{folder}/base"}}',
    ],
)
def test_a_base_is_recognised_by_any_name(tmp_path: Path, name: str) -> None:
    base = overlay(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    os.link(base, tmp_path / "hard")
    overlay(tmp_path / "work", name.format(folder=tmp_path))
    found = Tree([tmp_path]).overlays(base)
    assert names(found) == ["work"]


def test_names_of_other_protocols_and_broken_descriptions_are_nobody(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base")
    deep = '{"file":' * 400 + "1" + "}" * 400
    for number, name in enumerate(("nbd://host/base", "json:{", "json:[]", f"json:{deep}"[:1000], "json:{}")):
        overlay(tmp_path / f"odd{number}", name)
    scanned = Tree([tmp_path])
    assert scanned.overlays(base) == []
    assert len(scanned.references) == 5


def test_a_loop_of_overlays_ends(tmp_path: Path) -> None:
    first = overlay(tmp_path / "first", "second")
    overlay(tmp_path / "second", "first")
    assert names(Tree([tmp_path]).descendants(first)) == ["second"]


def test_headers_longer_than_the_first_look(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base")
    header = Header()
    header.cluster_bits = 21
    header.l1_offset = 3 << 21
    header.l1_size = 1
    header.refcount_table_offset = 1 << 21
    header.refcount_table_clusters = 1
    header.set(0x12345678, bytes(1 << 20))
    header.backing_name = "base"
    (tmp_path / "long").write_bytes(header.encode())
    assert names(Tree([tmp_path]).overlays(base)) == ["long"]


def test_broken_images_are_reported(tmp_path: Path) -> None:
    broken = overlay(tmp_path / "broken", "base")
    data = bytearray(broken.read_bytes())
    data[16:20] = b"\xff\xff\xff\xff"
    broken.write_bytes(data)
    unknown = overlay(tmp_path / "unknown", "base")
    data = bytearray(unknown.read_bytes())
    data[4:8] = b"\0\0\0\4"
    unknown.write_bytes(data)
    scanned = Tree([tmp_path])
    assert [path for path, _ in scanned.unreadable] == [str(broken), str(unknown)]


def test_an_image_with_damaged_tables_names_its_base_all_the_same(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base")
    damaged = overlay(tmp_path / "damaged", "base")
    data = bytearray(damaged.read_bytes())
    data[36:56] = b"\xff" * 20
    data[72:80] = b"\xff" * 7 + b"\xfb"
    damaged.write_bytes(data)
    scanned = Tree([tmp_path])
    assert names(scanned.overlays(base)) == ["damaged"]
    assert scanned.unreadable == []


def test_pipes_and_folders_are_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.qcow2").mkdir()
    assert Tree([tmp_path, tmp_path / "absent"]).references == []


def test_json_is_not_needed_to_be_well_formed_utf8(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base\udcff")
    overlay(tmp_path / "work", "base\udcff")
    assert names(Tree([tmp_path]).overlays(base)) == ["work"]
    assert json.dumps(os.fspath(base))

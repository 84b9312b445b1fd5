"""From names and descriptions to nodes: what a name means, what children inherit, how a format is guessed and what a guess forbids."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.node.node import DISCARD, WRITE_REQUEST, ZERO_REQUEST, BlockNode
from cowhand.block.opening.filenames import combine, has_protocol
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.signatures import MARKS, looks_like_a_format
from cowhand.core.errors import (
    AccessDenied,
    CowhandError,
    ImageNotFound,
    InvalidArgument,
    InvalidFormat,
    UnsupportedFeature,
)
from cowhand.drivers import REGISTRY
from cowhand.image.create import create
from tests.hostile.chains import base_content, chain, overlay

SECTOR = 512


def described(root: BlockNode, *names: str) -> BlockNode:
    """Follow children by their names."""
    for name in names:
        root = root.children[name].node
    return root


def raw_file(folder: Path, size: int = 64 << 10, name: str = "disk.raw") -> Path:
    path = folder / name
    path.write_bytes(base_content()[:size])
    return path


class TestNames:
    """A name is a path unless a protocol stands before the first colon, and that before the first slash."""

    @pytest.mark.parametrize("name", ["nbd:host", "file:x", "json:{}", "http://host/a", "a-b+c.d:x"])
    def test_protocols(self, name: str) -> None:
        assert has_protocol(name)

    @pytest.mark.parametrize("name", ["x", "/a:b", "./nbd:host", "a/b:c", "", ":x", "ä:x"])
    def test_paths(self, name: str) -> None:
        assert not has_protocol(name)

    @pytest.mark.parametrize(
        ("image", "backing", "means"),
        [
            ("top", "base", "base"),
            ("dir/top", "base", "dir/base"),
            ("/a/b/top", "../base", "/a/b/../base"),
            ("/a/top", "/c/base", "/c/base"),
            ("/a/top", "nbd:host", "nbd:host"),
            ("/a/top", "json:{}", "json:{}"),
            ("file:/a/top", "base", "/a/base"),
            ("http://host/a/top", "base", "http://host/a/base"),
            ("/a/top", "./nbd:host", "/a/./nbd:host"),
        ],
    )
    def test_names_in_an_image_are_relative_to_it(self, image: str, backing: str, means: str) -> None:
        assert combine(image, backing) == means

    def test_an_image_without_a_place_has_no_relative_names(self) -> None:
        with pytest.raises(InvalidArgument, match="Cannot use relative"):
            combine('json:{"driver":"memory"}', "base")
        assert combine('json:{"driver":"memory"}', "/base") == "/base"

    def test_colons_in_paths_need_a_slash(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        raw_file(tmp_path, name="a:b")
        monkeypatch.chdir(tmp_path)
        with cowhand.open("./a:b") as disk:
            assert disk.size == 64 << 10
        with pytest.raises(InvalidArgument, match="Unknown protocol 'a'"):
            cowhand.open("a:b")

    def test_the_file_protocol(self, tmp_path: Path) -> None:
        with cowhand.open(f"file:{raw_file(tmp_path)}") as disk:
            assert (disk.format, described(disk.root, "file").driver) == ("raw", "file")


class TestDescriptions:
    """A description may be nested or dotted, a dictionary or JSON; it is the same disk."""

    @pytest.mark.parametrize("as_json", [False, True])
    @pytest.mark.parametrize("dotted", [False, True])
    def test_nested_and_dotted(self, tmp_path: Path, dotted: bool, as_json: bool) -> None:
        path = str(raw_file(tmp_path))
        what: dict[str, Any] = {"driver": "raw", "offset": 1024, "file": {"driver": "file", "filename": path}}
        if dotted:
            what = {"driver": "raw", "offset": "1k", "file.driver": "file", "file.filename": path}
        with cowhand.open("json:" + json.dumps(what) if as_json else what) as disk:
            assert disk.read(0, 1024) == base_content()[1024:2048]

    def test_zero_bytes_are_refused(self) -> None:
        for what in (
            "a\0b",
            {"driver": "file", "filename": "a\0"},
            {"driver": "blkdebug", "config": "\0", "image.driver": "memory"},
        ):
            with pytest.raises(InvalidArgument, match="zero byte"):
                cowhand.open(what)
        with pytest.raises(InvalidArgument, match="zero byte"):
            create("a\0b", "raw", "1M")

    def test_a_json_name_inside_a_description(self, tmp_path: Path) -> None:
        inner = json.dumps({"driver": "file", "filename": str(raw_file(tmp_path))})
        with cowhand.open({"driver": "raw", "file": {"filename": f"json:{inner}"}}) as disk:
            assert disk.read(0, 512) == base_content()[:512]

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ({"driver": "nothing"}, "Unknown driver 'nothing'"),
            ({"driver": "raw"}, "a raw image needs a 'file'"),
            ({}, "must be specified by a driver or a file name"),
            ({"driver": "raw", "file": {"driver": "null-co"}, "wings": 2}, "does not support the option 'wings'"),
            ({"driver": "raw", "offset": "much", "file": {"driver": "null-co"}}, "expects a number"),
            ({"driver": ["raw"]}, "'driver' expects a string"),
            ({"filename": 7}, "'filename' expects a string"),
            (
                {"driver": "raw", "file": "x", "file.driver": "raw"},
                "Cannot reference an existing block device",
            ),
            ("json:{", "Could not parse"),
            ("json:[1]", "Invalid JSON object"),
        ],
    )
    def test_what_is_wrong_with_it(self, what: Any, message: str) -> None:
        with pytest.raises(InvalidArgument, match=message):
            cowhand.open(what)

    def test_an_error_leaves_nothing_open(self, tmp_path: Path) -> None:
        top = tmp_path / "top.qcow2"
        top.write_bytes(overlay("missing.raw", format="raw").data)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ImageNotFound) as caught:
            cowhand.open(top, writable=True)
        assert len(os.listdir("/proc/self/fd")) == before
        assert "Could not open backing file: Could not open" in caught.value.qemu()
        with top.open("r+b"):
            cowhand.open(top, writable=True, backing=False).close()  # its locks were given back


class TestInheritance:
    """Children take over how the user wants things opened, unless their own description says otherwise."""

    def test_caching_and_sharing_reach_every_layer(self, tmp_path: Path) -> None:
        top = chain(tmp_path, 2)
        options = {"force-share": True, "cache.no-flush": True}
        with cowhand.open(top, options=options) as disk:
            for node in (disk.root, described(disk.root, "file"), described(disk.root, "backing", "backing", "file")):
                assert (node.options.force_share, node.options.cache_no_flush) == (True, True)

    def test_a_child_says_otherwise(self, tmp_path: Path) -> None:
        file = {"driver": "file", "filename": str(raw_file(tmp_path)), "cache.no-flush": False}
        with cowhand.open({"driver": "raw", "cache.no-flush": True, "file": file}) as disk:
            assert disk.root.options.cache_no_flush
            assert not described(disk.root, "file").options.cache_no_flush

    def test_what_lies_below_is_opened_for_reading(self, tmp_path: Path) -> None:
        with cowhand.open(chain(tmp_path, 2), writable=True) as disk:
            assert described(disk.root, "file").writable
            assert not described(disk.root, "backing").writable
            assert not described(disk.root, "backing", "backing", "file").writable

    def test_a_format_hands_discards_to_its_file(self, tmp_path: Path) -> None:
        with cowhand.open(chain(tmp_path, 1), writable=True) as disk:
            assert disk.root.options.discard is None
            assert described(disk.root, "file").capabilities.discard


class TestGuessing:
    """Where the user names no format, the first bytes tell."""

    def test_by_the_magic_bytes(self, tmp_path: Path) -> None:
        top = chain(tmp_path, 1)
        with cowhand.open(top) as disk:
            assert (disk.format, described(disk.root, "backing").driver, disk.root.probed) == ("qcow2", "raw", True)

    @pytest.mark.parametrize("size", [0, 1, 3, 511, 512, 2047])
    def test_what_is_short_is_raw(self, tmp_path: Path, size: int) -> None:
        with cowhand.open(raw_file(tmp_path, size)) as disk:
            assert disk.format == "raw"

    @pytest.mark.parametrize("mark", MARKS, ids=str)
    def test_foreign_formats_are_called_by_their_name(self, tmp_path: Path, mark: tuple[bytes, int, str]) -> None:
        magic, at, name = mark
        path = tmp_path / "foreign"
        path.write_bytes((bytes(at) + magic).ljust(4096, b"\0"))
        known = REGISTRY.find(name) is not None
        with pytest.raises(InvalidFormat if known else UnsupportedFeature) as caught:
            cowhand.open(path)
        if not known:
            assert f"this is a {name} image" in caught.value.message
        with cowhand.open(path, format="raw") as disk:
            assert disk.size == 4096

    def test_the_first_qcow_is_not_the_second(self, tmp_path: Path) -> None:
        path = tmp_path / "old"
        path.write_bytes(b"QFI\xfb\0\0\0\1".ljust(4096, b"\0"))
        if REGISTRY.find("qcow") is None:
            with pytest.raises(UnsupportedFeature, match="this is a qcow image"):
                cowhand.open(path)
        assert looks_like_a_format(b"QFI\xfb\0\0\0\2") == "qcow2"

    def test_a_named_format_is_not_guessed(self, tmp_path: Path) -> None:
        top = chain(tmp_path, 1)
        with cowhand.open(top, format="raw") as disk:
            assert disk.read(0, 4) == b"QFI\xfb"
            assert not disk.root.probed
        with pytest.raises(InvalidFormat, match="not a qcow2 image"):
            cowhand.open(tmp_path / "base.raw", format="qcow2")


class TestAGuessedRaw:
    """A raw image that was guessed does not let a guest write another format's header, so that the next guess is the same."""

    @pytest.mark.parametrize("mark", MARKS, ids=str)
    def test_no_way_of_writing_puts_a_mark_there(self, tmp_path: Path, mark: tuple[bytes, int, str]) -> None:
        magic, at, name = mark
        path = raw_file(tmp_path)
        sector = (bytes(at) + magic).ljust(SECTOR, b"\0")
        with cowhand.open(path, writable=True) as disk:
            for attempt in (
                lambda: disk.write(0, sector),
                lambda: disk.write(0, sector * 100),
                lambda: disk.write(0, sector[:3], sector[3:]),
                lambda: disk.write(at, magic),
                lambda: disk.submit([(WRITE_REQUEST, 0, sector)]),
            ):
                with pytest.raises(AccessDenied) as caught:
                    attempt()
                assert caught.value.errno == errno.EPERM
                assert caught.value.qemu() == "Operation not permitted"
                assert name in caught.value.message or name == "qcow2"
            assert disk.read(0, len(base_content())) == base_content()
        with cowhand.open(path) as disk:
            assert disk.format == "raw"

    def test_a_mark_does_not_arise_in_pieces(self, tmp_path: Path) -> None:
        path = raw_file(tmp_path)
        with cowhand.open(path, writable=True) as disk:
            disk.write(0, b"KDM")
            with pytest.raises(AccessDenied):
                disk.write(3, b"V")
            disk.write(0, b"QED\x01")
            for attempt in (
                lambda: disk.write_zeroes(3, 1),
                lambda: disk.discard(3, 1),
                lambda: disk.submit([(ZERO_REQUEST, 3, 1)]),
                lambda: disk.submit([(DISCARD, 3, 1)]),
            ):
                with pytest.raises(AccessDenied):
                    attempt()
            assert disk.read(0, 4) == b"QED\x01"

    def test_everything_else_may_be_written(self, tmp_path: Path) -> None:
        with cowhand.open(raw_file(tmp_path), writable=True) as disk:
            disk.write(0, b"\xeb\x63\x90boot")
            disk.write(1, b"KDMV")
            disk.write(SECTOR, b"QFI\xfb")
            disk.write_zeroes(0, SECTOR)
            disk.discard(0, 4096)
            assert disk.read(SECTOR, 4) in (b"QFI\xfb", bytes(4))
            assert disk.root.lane_fd == -1, "the fast lane would lead past the guard"

    def test_who_names_the_format_may_write_anything(self, tmp_path: Path) -> None:
        path = raw_file(tmp_path)
        with cowhand.open(path, format="raw", writable=True) as disk:
            disk.write(0, b"QFI\xfb\0\0\0\3")
        assert path.read_bytes()[:4] == b"QFI\xfb"


class TestChains:
    """A chain opens in time linear in its length, and reads whatever its length is."""

    def test_two_hundred_layers(self, tmp_path: Path) -> None:
        costs = {}
        for length in (50, 200):
            folder = tmp_path / str(length)
            folder.mkdir()
            top = chain(folder, length)
            rounds = []
            for _ in range(3):
                begin = time.process_time()
                with cowhand.open(top) as disk:
                    rounds.append(time.process_time() - begin)
                    assert disk.read(0, len(base_content())) == base_content()
            costs[length] = min(rounds)
        assert costs[200] < 12 * costs[50] + 0.5  # quadratic: 16 times

    def test_writing_to_the_top_copies_from_the_bottom(self, tmp_path: Path) -> None:
        top = chain(tmp_path, 200)
        with cowhand.open(top, writable=True) as disk:
            disk.write(700, b"top")
            disk.write_zeroes(2000, 100)
        content = bytearray(base_content())
        content[700:703] = b"top"
        content[2000:2100] = bytes(100)
        with cowhand.open(top) as disk:
            assert disk.read(0, len(content)) == content
            assert {row.depth for batch in disk.extents() for row in batch} == {0, 200}

    def test_a_loop_is_told_from_a_chain(self, tmp_path: Path) -> None:
        top = tmp_path / "self.qcow2"
        top.write_bytes(overlay("self.qcow2").data)
        with pytest.raises(UnsupportedFeature, match="comes back to this file") as caught:
            cowhand.open(top)
        assert "self.qcow2" in str(caught.value)

    def test_one_base_may_appear_under_two_disks(self, tmp_path: Path) -> None:
        chain(tmp_path, 1)
        second = tmp_path / "second.qcow2"
        second.write_bytes(overlay("base.raw", format="raw").data)
        with cowhand.open(tmp_path / "0.qcow2", writable=True) as one, cowhand.open(second, writable=True) as two:
            assert one.read(0, 512) == two.read(0, 512)

    def test_an_opening_without_backing_opens_one_file(self, tmp_path: Path) -> None:
        top = tmp_path / "top.qcow2"
        top.write_bytes(overlay("missing.raw", format="raw").data)
        with cowhand.open(top, backing=False) as disk:
            assert disk.read(0, 512) == bytes(512)
            assert disk.root.backing is None


@pytest.mark.parametrize(
    "what",
    [
        {"file": None},
        {"file": []},
        {"file": {"file": {"file": {}}}},
        {"driver": ""},
        {"filename": ""},
        {"filename": "\0"},
        {"driver": "qcow2", "file": 3},
        {"driver": "raw", "file": True},
        {"driver": "qcow2", "file": {"driver": "null-co"}, "backing": 5},
        {"driver": "file", "filename": "/"},
        {"a.b": 1, "a": 2},
        {"driver": "blkdebug"},
        {"driver": "raw", "size": -5, "file": {"driver": "null-co"}},
        {"driver": "raw", "offset": -1, "file": {"driver": "null-co"}},
        {"driver": "raw", "offset": 1 << 70, "file": {"driver": "null-co"}},
        {"driver": "null-co", "size": 1 << 70},
        {"driver": "null-co", "size": -1},
        {"driver": "memory", "size": -1},
        {"driver": "memory", "request-alignment": 3},
        {"driver": "raw", "cache": 3, "file": {"driver": "null-co"}},
        {"driver": "raw", "cache": {"direct": {"a": 1}}, "file": {"driver": "null-co"}},
        "json:" + '{"file":' * 300 + "{}" + "}" * 300,
        "json:" + json.dumps({"file." * 400 + "driver": "null-co"}),
        "json:" + json.dumps({"driver": "raw", **{"file." * n + "driver": "raw" for n in range(1, 200)}}),
    ],
    ids=str,
)
def test_descriptions_are_answered_whatever_they_are(what: Any) -> None:
    with pytest.raises(CowhandError):
        Opening(REGISTRY).open(what)

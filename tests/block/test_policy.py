"""What is opened on an image's word: nothing that the policy does not allow, in whatever form the image names it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.opening.policy import DEFAULT, UNTRUSTED, Policy
from cowhand.block.protocols.file.node import FileNode
from cowhand.core.errors import CowhandError, InvalidArgument, PolicyRefused, UnsupportedFeature
from cowhand.image.info import chain_info
from tests.hostile.chains import base_content, overlay

_opened: list[str] = []
_watching = False
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str):
        _opened.append(os.path.realpath(arguments[0]))


@contextmanager
def opened_below(folder: Path) -> Iterator[list[str]]:
    """Give the list of files below *folder* that are opened inside the ``with`` block, as their names there."""
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for the life of the process: hooks cannot be taken away
        _hooked = True
    _opened.clear()
    found: list[str] = []
    _watching = True
    try:
        yield found
    finally:
        _watching = False
        root = f"{folder.resolve()}/"
        found.extend(sorted({path.removeprefix(root) for path in _opened if path.startswith(root)}))


class House:
    """A folder with an allowed part, "images", and a secret beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "images"
        self.images.mkdir()
        (root / "images2").mkdir()
        self.secret = root / "images2" / "secret.raw"
        for path in (self.secret, self.images / "base.raw"):
            path.write_bytes(base_content())
        self.policy = DEFAULT.within(str(self.images))

    def image(self, backing: str, *, format: str | None = "raw", name: str = "top.qcow2") -> Path:
        """Return an image that names *backing*."""
        path = self.images / name
        path.write_bytes(overlay(backing, format=format, cluster_bits=12).data)
        return path

    def refused(self, top: Path, policy: Policy, error: type[CowhandError] = PolicyRefused) -> CowhandError:
        """Open *top*, which must fail without the secret being opened; return the error."""
        with opened_below(self.root) as opened, pytest.raises(error) as caught:
            cowhand.open(top, policy=policy)
        assert "images2/secret.raw" not in opened
        problem = chain_info(top, policy=policy)[1].problem
        assert problem, "a picture of the chain shows what opening it refuses"
        return caught.value


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


class TestUntrusted:
    """UNTRUSTED opens nothing that an image names."""

    @pytest.mark.parametrize(
        "name", ["base.raw", "file:base.raw", 'json:{"driver":"null-co"}', "no such file", "nbd:host:1"]
    )
    @pytest.mark.parametrize("format", ["raw", None])
    def test_only_the_image_itself_is_opened(self, house: House, name: str, format: str | None) -> None:
        top = house.image(name, format=format)
        with opened_below(house.root) as opened, pytest.raises(PolicyRefused) as caught:
            cowhand.open(top, policy=UNTRUSTED)
        assert opened == ["images/top.qcow2"]
        assert str(top) in str(caught.value)
        assert caught.value.hint is not None

    def test_a_description_of_the_chain_opens_nothing_either(self, house: House) -> None:
        top = house.image("base.raw")
        with opened_below(house.root) as opened:
            found = chain_info(top, policy=UNTRUSTED)
        assert opened == ["images/top.qcow2"]
        assert "is not opened" in found[1].problem

    def test_what_the_user_names_is_opened(self, house: House) -> None:
        top = house.image("no such file")
        backing = {"driver": "raw", "file": {"driver": "file", "filename": str(house.secret)}}
        with cowhand.open(
            {"driver": "qcow2", "file": {"filename": str(top)}, "backing": backing}, policy=UNTRUSTED
        ) as disk:
            assert disk.read(0, 4096) == base_content()[:4096]

    def test_an_image_that_names_nothing_is_opened(self, house: House) -> None:
        with cowhand.open(house.images / "base.raw", policy=UNTRUSTED) as disk:
            assert disk.format == "raw"


class TestDirectories:
    """With directories, what an image names lies inside of them, links followed."""

    def test_a_file_inside_is_opened(self, house: House) -> None:
        for name in (
            "base.raw",
            "./base.raw",
            "../images/base.raw",
            str(house.images / "base.raw"),
            f"file:{house.images}/base.raw",
        ):
            with cowhand.open(house.image(name), policy=house.policy) as disk:
                assert disk.read(0, 1 << 16) == base_content()

    def test_a_file_outside_is_not(self, house: House) -> None:
        for name in (
            "../images2/secret.raw",
            str(house.secret),
            f"file:{house.secret}",
            "../images/../images2/secret.raw",
        ):
            for format in ("raw", None):
                error = house.refused(house.image(name, format=format), house.policy)
                assert "outside of the allowed directories" in error.message

    def test_links_are_followed_before_they_are_judged(self, house: House) -> None:
        (house.images / "away").symlink_to("../images2")
        (house.images / "secret.raw").symlink_to(house.secret)
        (house.root / "elsewhere").symlink_to(house.images)
        for name in ("secret.raw", "away/secret.raw"):
            house.refused(house.image(name), house.policy)
        with cowhand.open(house.image("base.raw"), policy=DEFAULT.within(str(house.root / "elsewhere"))) as disk:
            assert disk.read(0, 512) == base_content()[:512]

    def test_a_link_that_is_turned_while_it_is_being_opened(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link = house.images / "link.raw"
        link.symlink_to("base.raw")
        top = house.image("link.raw")
        really_open = FileNode._open

        def turn_and_open(node: FileNode) -> None:
            if node.path.endswith("link.raw"):
                link.unlink()
                link.symlink_to(house.secret)
            really_open(node)

        monkeypatch.setattr(FileNode, "_open", turn_and_open)
        with pytest.raises(PolicyRefused, match="outside of the allowed directories"):
            cowhand.open(top, policy=house.policy)

    def test_the_folder_of_the_process_does_not_make_a_protocol_a_path(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Taken for a path, "file:/secret" would lie in a folder called "file:" right here."""
        monkeypatch.chdir(house.images)
        for name in (f"file:{house.secret}", f"blkdebug::{house.secret}", f"host_device:{house.secret}"):
            house.refused(house.image(name), house.policy)

    def test_json_names_are_no_way_around(self, house: House) -> None:
        secret = house.secret
        for name in (
            '{"driver":"raw","file":{"driver":"file","filename":"%s"}}',
            '{"driver":"raw","file.driver":"file","file.filename":"%s"}',
            '{"file":{"filename":"%s"}}',
            '{"filename":"%s"}',
            '{"driver":"file","filename":"file:%s"}',
            '{"driver":"raw","file":{"driver":"raw","file":{"driver":"raw","file":{"filename":"%s"}}}}',
        ):
            house.refused(house.image("json:" + name % secret, format=None), house.policy)

    def test_nor_is_a_backing_file_inside_a_json_name(self, house: House) -> None:
        house.image("base.raw", name="middle.qcow2")
        middle, secret = house.images / "middle.qcow2", house.secret
        name = '{"driver":"qcow2","file":{"filename":"%s"},"backing":{"driver":"raw","file":{"filename":"%s"}}}'
        with opened_below(house.root) as opened, pytest.raises(PolicyRefused):
            cowhand.open(house.image("json:" + name % (middle, secret), format=None), policy=house.policy)
        assert "images2/secret.raw" not in opened

    def test_filters_and_networks_are_refused_by_name(self, house: House) -> None:
        (house.root / "rules").write_text('[inject-error]\nevent = "read_aio"\n')
        inner = {"driver": "file", "filename": str(house.images / "base.raw")}
        filtered = {"driver": "blkdebug", "image": inner, "config": str(house.root / "rules")}
        for driver, name in (
            ("blkdebug", "json:" + json.dumps(filtered)),
            ("blkdebug", f"blkdebug:{house.root}/rules:{house.images}/base.raw"),
            ("null-co", 'json:{"driver":"null-co","size":4096}'),
        ):
            error = house.refused(house.image(name, format=None), house.policy)
            assert f"'{driver}'" in error.message

    def test_every_layer_is_asked_about(self, house: House) -> None:
        house.image(str(house.secret), name="middle.qcow2")
        with opened_below(house.root) as opened, pytest.raises(PolicyRefused):
            cowhand.open(house.image("middle.qcow2", format="qcow2"), policy=house.policy)
        assert opened == ["images/middle.qcow2", "images/top.qcow2"]


class TestNarrowing:
    """Each rule holds by itself."""

    def test_node_names_are_no_file_names(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(house.images)
        for name in ('json:{"driver":"raw","file":"base.raw"}', 'json:{"driver":"qcow2","file":"base.raw"}'):
            with pytest.raises(InvalidArgument, match=r"node-name='base\.raw'"):
                cowhand.open(house.image(name, format=None))

    def test_json_names_can_be_forbidden(self, house: House) -> None:
        top = house.image('json:{"driver":"null-co","size":65536}', format=None)
        with cowhand.open(top) as disk:
            assert disk.size == 1 << 16
        house.refused(top, DEFAULT._replace(json_names=False))

    def test_guessing_the_format_can_be_forbidden(self, house: House) -> None:
        careful = DEFAULT._replace(probe_backing=False)
        house.refused(house.image("base.raw", format=None), careful)
        with cowhand.open(house.image("base.raw", format="raw"), policy=careful) as disk:
            assert disk.read(1024, 512) == base_content()[1024:1536]

    def test_drivers_can_be_named(self, house: House) -> None:
        house.image("base.raw", name="middle.qcow2")
        only = DEFAULT._replace(drivers=frozenset({"file", "qcow2"}))
        for format in ("raw", None):
            error = house.refused(house.image("base.raw", format=format), only)
            assert "'raw'" in error.message
        with cowhand.open(house.image("base.raw"), policy=DEFAULT._replace(drivers=frozenset({"file", "raw"}))) as disk:
            assert disk.size == 1 << 16

    def test_depth(self, house: House) -> None:
        house.image("base.raw", name="0.qcow2")
        for number in (1, 2):
            house.image(f"{number - 1}.qcow2", format="qcow2", name=f"{number}.qcow2")
        top = house.images / "2.qcow2"
        cowhand.open(top, policy=DEFAULT._replace(max_depth=3)).close()
        with pytest.raises(UnsupportedFeature, match="more than 2 deep"):
            cowhand.open(top, policy=DEFAULT._replace(max_depth=2))


def test_an_image_cannot_make_its_reader_wait_for_a_pipe(house: House) -> None:
    pipe = house.images / "rules"
    os.mkfifo(pipe)
    image = house.image(f"blkdebug:{pipe}:{house.images}/base.raw")
    with pytest.raises(PolicyRefused, match="no regular file"):
        cowhand.open(image)

"""Where images that read through others are looked for, and what is left alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowhand.chain.known_pools import known_pools
from cowhand.chain.places import NEIGHBOUR_DEPTH, Place, around, block_devices
from cowhand.chain.tree import Tree
from cowhand.core.identity import identify, lies_on
from tests.chain.test_tree import names, overlay
from tests.tools.programs import find, run

needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root (loop devices)")


@pytest.fixture(autouse=True)
def no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWHAND_POOLS", "")


def folders(path: Path) -> dict[str, int | None]:
    return {os.path.realpath(place.folder): place.depth for place in around([str(path)])}


def test_own_folder_and_those_beside_it_and_above(tmp_path: Path) -> None:
    own = tmp_path / "w" / "instances" / "a"
    own.mkdir(parents=True)
    assert folders(own / "disk") == {
        str(own): None,
        str(own.parent): NEIGHBOUR_DEPTH,
        str(own.parent.parent): NEIGHBOUR_DEPTH,
        str(tmp_path): NEIGHBOUR_DEPTH,
    }


def test_where_things_meet_there_are_no_neighbours(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    own = shared / "mine" / "images"
    own.mkdir(parents=True)
    shared.chmod(0o777 | stat.S_ISVTX)
    assert folders(own / "disk") == {str(own): None, str(own.parent): NEIGHBOUR_DEPTH}
    assert folders(shared / "disk") == {str(shared): NEIGHBOUR_DEPTH}
    assert folders(Path("/disk")) == {"/": 1}
    assert "/" not in folders(Path("/home/disk")) and "/home" not in folders(Path("/home/somebody/disk"))


def test_a_link_has_two_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "disk").write_bytes(bytes(512))
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a" / "disk")
    found = folders(tmp_path / "b" / "link")
    assert found[str(tmp_path / "a")] is None and found[str(tmp_path / "b")] is None


def test_pools_are_listed_in_the_variable_in_files_and_by_libvirt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "a & b", "config/cowhand", "config/libvirt/storage"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config/cowhand/pools").write_text(
        f"# mine\n{tmp_path}/one\n-{tmp_path}/two\n\n{tmp_path}/absent\nrelative\n"
    )
    (tmp_path / "config/libvirt/storage/default.xml").write_text(
        "<pool type='dir'><name>default</name><source><path>/not/this</path></source>\n"
        f"<target>\n  <path>{tmp_path}/a &amp; b</path>\n<permissions/></target></pool>"
    )
    found = known_pools({"XDG_CONFIG_HOME": str(tmp_path / "config")})
    assert {f"{tmp_path}/one", f"{tmp_path}/a & b"} <= set(found.folders)
    assert found.left_out == (f"{tmp_path}/two",)
    assert f"{tmp_path}/absent" not in found.folders and "relative" not in found.folders
    alone = known_pools(
        {"XDG_CONFIG_HOME": str(tmp_path / "config"), "COWHAND_POOLS": f"{tmp_path}/two:-{tmp_path}/one"}
    )
    assert alone == ((f"{tmp_path}/two",), (f"{tmp_path}/one",))
    assert known_pools({"COWHAND_POOLS": ""}) == ((), ())


def test_what_is_left_out_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = overlay(tmp_path / "base")
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        overlay(tmp_path / name / "top", "../base")
    monkeypatch.setenv("COWHAND_POOLS", f"-{tmp_path}/out")
    tree = Tree()
    tree.look(around([str(base)]))
    assert [one.path for one in tree.overlays(base)] == [str(tmp_path / "in" / "top")]


def test_places_are_looked_into_once_and_deeper_where_asked(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base")
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    overlay(tmp_path / "a" / "b" / "c" / "top", str(base))
    tree = Tree()
    tree.look([Place(str(tmp_path), 2)])
    entries = tree.entries
    assert tree.overlays(base) == []
    tree.look([Place(str(tmp_path), None)])
    assert names(tree.overlays(base)) == ["top"]
    assert len(tree.references) == 1
    tree.look([Place(str(tmp_path / "a"), None), Place(str(tmp_path), None)])
    assert len(tree.references) == 1 and tree.entries == entries + 1


def test_links_to_folders_are_followed_a_little_and_loops_of_them_end(tmp_path: Path) -> None:
    base = overlay(tmp_path / "w" / "base") if (tmp_path / "w").mkdir() is None else tmp_path
    (tmp_path / "far" / "deep").mkdir(parents=True)
    overlay(tmp_path / "far" / "deep" / "top", str(base))
    (tmp_path / "w" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "w")
    (tmp_path / "w" / "itself").symlink_to("itself")
    (tmp_path / "w" / "nothing").symlink_to("absent")
    tree = Tree()
    tree.look([Place(str(tmp_path / "w"), None)])
    assert names(tree.overlays(base)) == ["top"]
    assert tree.unreadable == []


def test_the_number_of_files_is_limited_and_that_is_told(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base")
    for number in range(30):
        (tmp_path / f"file{number}").write_bytes(b"x")
    tree = Tree(limit=20)
    tree.look([Place(str(tmp_path), None)])
    assert [path for path, _ in tree.unreadable] == [str(tmp_path)]
    assert "more than 20" in tree.unreadable[0][1]
    tree.look([Place(str(base.parent.parent), None)])
    assert len(tree.unreadable) == 1


def test_ten_thousand_images_are_found(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base")
    content = overlay(tmp_path / "one", "../base").read_bytes()
    (tmp_path / "one").unlink()
    for folder in range(100):
        path = tmp_path / f"folder{folder}"
        path.mkdir()
        for number in range(100):
            (path / f"disk{number}").write_bytes(content)
    tree = Tree()
    tree.look(around([str(base)]))
    assert len(tree.overlays(base)) == 10_000
    assert len(tree.references) == 10_000 and tree.unreadable == []


@contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """Be a user without rights to what is not readable for all, where the tests run as root; let *folder* be reached."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    path = folder
    while path != path.parent and path.stat().st_uid == 0 and path != Path("/tmp"):
        path.chmod(path.stat().st_mode | 0o055)
        path = path.parent
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_listed_or_read_is_told(tmp_path: Path) -> None:
    base = overlay(tmp_path / "base")
    closed = tmp_path / "closed"
    closed.mkdir()
    unread = overlay(tmp_path / "unread", "base")
    unread.chmod(0)
    closed.chmod(0)
    try:
        with nobody(tmp_path):
            tree = Tree()
            tree.look([Place(str(tmp_path), 1)])
            tree.look([Place(str(tmp_path), None)])
    finally:
        closed.chmod(0o755)
    assert sorted(tree.unreadable) == [(str(closed), "Permission denied"), (str(unread), "Permission denied")]
    assert tree.overlays(base) == []


@needs_root
@pytest.mark.root
def test_images_on_loop_devices_and_over_them_are_found(tmp_path: Path) -> None:
    if find("losetup") is None:
        pytest.skip("needs losetup")
    base = overlay(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    kept = overlay(tmp_path / "elsewhere" / "kept", str(base))
    with open(kept, "r+b") as file:
        file.truncate(1 << 20)
    with open(base, "r+b") as file:
        file.truncate(1 << 20)
    devices = []
    try:
        for path in (kept, base):
            made = run("losetup", "--find", "--show", str(path), check=False)
            if made.status:
                pytest.skip(f"no loop devices here: {made.stderr.strip()}")
            devices.append(made.stdout.strip())
        over = overlay(tmp_path / "over", devices[1])
        found = {device.path for device in block_devices()}
        assert set(devices) <= found
        assert identify(base) in lies_on(devices[1])
        tree = Tree([tmp_path])
        tree.look([], block_devices())
        # By the device that an overlay lies on; and the overlay of a device, by the file that the device lies on.
        assert {one.path for one in tree.overlays(base)} == {devices[0], str(over)}
        assert {one.path for one in tree.overlays(devices[1])} == {devices[0], str(over)}
        assert str(tmp_path) in {place.folder for place in around([devices[1]])}
    finally:
        for device in devices:
            run("losetup", "--detach", device, check=False)

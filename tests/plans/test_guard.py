"""The guard: what would change what other images or snapshots show is refused, by the library as by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cowhand
from cowhand.chain import tree
from cowhand.core.errors import ChainLoop, OverlaysExist, SearchIncomplete
from cowhand.image.create import create as make
from tests.cli.command import cowhand as command
from tests.cli.images import MiB, content, fill, image
from tests.copy.mounts import needs_root
from tests.plans.command import in_process
from tests.tools.programs import find, run
from tests.tools.qemu import qemu_img, require_qemu


@pytest.fixture(autouse=True)
def no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWHAND_POOLS", "")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Return a folder with _base/base, and over it instances/a/disk and instances/b/disk."""
    for name in ("_base", "instances/a", "instances/b"):
        (tmp_path / "world" / name).mkdir(parents=True)
    world = tmp_path / "world"
    base = image(world / "_base" / "base", 4 * MiB)
    fill(base, 0, 4 * MiB, 1)
    for name in ("a", "b"):
        fill(image(world / "instances" / name / "disk", backing=base), 0, MiB, 2)
    return world


def shrink(path: Path, force: bool) -> None:
    with cowhand.open(path, writable=True) as disk:
        disk.resize(MiB, shrink=True, force=force)


def go_back(path: Path, force: bool) -> None:
    with cowhand.open(path, writable=True) as disk:
        cowhand.apply_snapshot(disk, "s", force=force)


def write_open_disk(path: Path, force: bool) -> None:
    with cowhand.open(path, writable=True) as disk:
        cowhand.convert(path.parent / "other", disk, force=force)


VERBS: dict[str, Callable[[Path, bool], object]] = {
    "resize": shrink,
    "apply": go_back,
    "create": lambda path, force: cowhand.create(path, "qcow2", MiB, overwrite=True, force=force),
    "convert": lambda path, force: cowhand.convert(path.parent / "other", path, "qcow2", overwrite=True, force=force),
    "in place": lambda path, force: cowhand.convert(path.parent / "other", path, skip_create=True, force=force),
    "open disk": write_open_disk,
    "dd": lambda path, force: cowhand.dd(path.parent / "other", path, "qcow2", overwrite=True, force=force),
    "rebase -u": lambda path, force: cowhand.rebase(path, "other", "qcow2", unsafe=True, force=force),
    "commit": lambda path, force: cowhand.commit(path.parent / "top", force=force),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_of_the_library_are_refused_and_can_be_forced(world: Path, verb: str) -> None:
    base, over = world / "_base" / "base", world / "instances" / "b" / "disk"
    with cowhand.open(base, writable=True) as disk:
        cowhand.create_snapshot(disk, "s")
        disk.write(3 * MiB, bytes([9]) * MiB)
    fill(image(base.parent / "other", 4 * MiB), 0, MiB, 5)
    fill(image(base.parent / "top", backing=base), 2 * MiB, MiB, 7)
    before, file = content(over), base.read_bytes()
    with pytest.raises(OverlaysExist, match=r"instances/./disk") as caught:
        VERBS[verb](base, False)
    assert len(caught.value.facts["overlays"]) >= 2
    assert content(over) == before
    if verb != "apply":  # opening it for writing may change its header
        assert base.read_bytes() == file
    VERBS[verb](base, True)
    assert content(over) != before or verb == "rebase -u"  # the base stores everything itself


def test_what_lies_below_are_plain_functions_without_a_guard(world: Path) -> None:
    from cowhand.image.open import open_image
    from cowhand.jobs.commit import commit

    commit(str(world / "instances" / "a" / "disk"))
    with open_image(world / "_base" / "base", writable=True) as disk:
        disk.resize(2 * MiB, shrink=True)


@require_qemu
def test_the_compatible_tool_does_as_qemu_does(world: Path) -> None:
    words = ("-m", "cowhand.cli.compat.img", "commit", "-q", str(world / "instances" / "a" / "disk"))
    assert subprocess.run([sys.executable, *words], timeout=60).returncode == 0
    assert content(world / "instances" / "b" / "disk")[:MiB] == bytes([2]) * MiB


@pytest.mark.parametrize(
    ("base", "mine", "sibling"),
    [
        ("cache/base", "vms/a", "vms/b"),
        ("_base/base", "instances/a/disk", "instances/b/disk"),
        ("base", "a", "vm/deep/er/b"),
        ("base", "vms/one/a", "vms/two/x/b"),
        ("pool/base", "mine/a", "pool/sub/b"),
    ],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_siblings_are_found(tmp_path: Path, base: str, mine: str, sibling: str, absolute: bool) -> None:
    for name in (base, mine, sibling):
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
    below = tmp_path / "w" / base
    make(below, "qcow2", MiB)
    for name in (mine, sibling):
        path = tmp_path / "w" / name
        make(
            path,
            "qcow2",
            backing=str(below) if absolute else os.path.relpath(below, path.parent),
            backing_format="qcow2",
        )
    with pytest.raises(OverlaysExist):
        cowhand.commit(tmp_path / "w" / mine)
    (tmp_path / "w" / sibling).unlink()
    cowhand.commit(tmp_path / "w" / mine)


def test_internal_snapshots_of_the_overlay_and_of_layers_between_count(tmp_path: Path) -> None:
    base = image(tmp_path / "base", MiB)
    top = image(tmp_path / "top", backing=base)
    with cowhand.open(top, writable=True) as disk:
        disk.write(0, bytes([1]) * 65536)
        cowhand.create_snapshot(disk, "s")
    for call in (
        lambda: cowhand.commit(top),
        lambda: cowhand.commit(top, drop=True),
        lambda: cowhand.rebase(top, ""),
        lambda: cowhand.rebase(top, "", unsafe=True),
    ):
        with pytest.raises(OverlaysExist, match="top, snapshot s") as caught:
            call()
        assert caught.value.facts["snapshots"] == [(str(top), "s")]
    document = json.loads(command("commit", "--dry-run", "--output", "json", "top", cwd=tmp_path).stdout)
    assert document["dependent-snapshots"] == [{"filename": "top", "snapshot": "s"}]
    assert "depends on it: top, snapshot s" in command("rebase", "--dry-run", "-b", "", "top", cwd=tmp_path).stdout
    # One that holds all of its data itself shows nothing of the base.
    with cowhand.open(top, writable=True) as disk:
        cowhand.delete_snapshot(disk, "s")
        disk.write(0, bytes(MiB))
        cowhand.create_snapshot(disk, "whole")
    cowhand.commit(top)
    cowhand.rebase(top, "")


def test_the_same_file_under_another_name_is_no_other_backing_file(world: Path) -> None:
    """A name may be changed under overlays and snapshots, as long as it means what it meant; and where nothing can be read anyhow."""
    middle = world / "instances" / "a" / "disk"
    image(world / "top", backing=middle)
    with cowhand.open(middle, writable=True) as disk:
        cowhand.create_snapshot(disk, "s")
    cowhand.rebase(middle, str(world / "_base" / "base"), "qcow2", unsafe=True)
    with pytest.raises(OverlaysExist):
        cowhand.rebase(middle, str(world / "_base" / "base"), "raw", unsafe=True)
    (world / "_base").rename(world / "moved")
    cowhand.rebase(middle, str(world / "moved" / "base"), "qcow2", unsafe=True)
    with pytest.raises(OverlaysExist):
        cowhand.rebase(middle, "", unsafe=True)


def test_data_files_and_extents_are_read_through_too(tmp_path: Path) -> None:
    raw = tmp_path / "data.raw"
    raw.write_bytes(bytes([1]) * MiB)
    make(tmp_path / "disk", "qcow2", MiB, {"data_file": str(raw), "data_file_raw": True, "keep_data_file": True})
    make(tmp_path / "other", "raw", MiB)
    with pytest.raises(OverlaysExist, match="disk"):
        cowhand.convert(tmp_path / "other", raw, "raw", source_format="raw", overwrite=True)
    with pytest.raises(OverlaysExist, match="disk"):
        cowhand.create(tmp_path / "new", "qcow2", MiB, {"data_file": str(raw)}, overwrite=True)
    # Its own file is no other image's.
    with cowhand.open(tmp_path / "disk", writable=True) as disk:
        disk.resize(MiB // 2, shrink=True)
    (tmp_path / "disk.vmdk").write_text(
        '# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\nRW 2048 FLAT "other" 0\n'
    )
    with pytest.raises(OverlaysExist, match="vmdk"):
        cowhand.dd(tmp_path / "disk", tmp_path / "other", "raw", overwrite=True)


@require_qemu
@pytest.mark.parametrize("format", ["qcow", "qed", "vmdk"])
def test_overlays_of_other_formats_count(tmp_path: Path, format: str) -> None:
    base_format = "vmdk" if format == "vmdk" else "qcow2"
    qemu_img("create", "-q", "-f", base_format, tmp_path / "base", "1M")
    qemu_img("create", "-q", "-f", format, "-b", tmp_path / "base", "-F", base_format, tmp_path / "top")
    with pytest.raises(OverlaysExist, match="top"):
        cowhand.create(tmp_path / "base", "raw", MiB, overwrite=True)


def test_an_image_in_a_loop_can_be_rebased_out_of_it(tmp_path: Path) -> None:
    for name, backing in (("a", "b"), ("b", "a"), ("self", "self2")):
        make(tmp_path / name, "qcow2", MiB, backing=backing, backing_format="qcow2", open_backing=False)
    image(tmp_path / "base", MiB)
    (tmp_path / "self2").symlink_to("self")
    command("rebase", "-u", "-F", "qcow2", "-b", "base", "self", cwd=tmp_path)
    command("rebase", "-u", "-F", "qcow2", "-b", "base", "a", cwd=tmp_path)
    assert cowhand.find_dependents(tmp_path / "a").paths == [str(tmp_path / "b")]


@pytest.mark.parametrize("target", ["vm", "child", "grandchild", "link", "hard"])
def test_no_operation_makes_a_loop(tmp_path: Path, target: str) -> None:
    names = ["root", "vm", "child", "grandchild"]
    for below, name in zip([None, *names], names, strict=False):
        image(tmp_path / name, MiB, backing=tmp_path / below if below else None)
    (tmp_path / "link").symlink_to("child")
    os.link(tmp_path / "child", tmp_path / "hard")
    vm = tmp_path / "vm"
    before = vm.read_bytes()
    for call in (
        lambda: cowhand.rebase(vm, target, "qcow2"),
        lambda: cowhand.rebase(vm, target, "qcow2", unsafe=True, force=True, force_share=True),
        lambda: cowhand.create(
            vm, "qcow2", MiB, backing=f"./{target}", backing_format="qcow2", overwrite=True, force=True
        ),
        lambda: cowhand.create(
            vm,
            "qcow2",
            MiB,
            backing=f"./{target}",
            backing_format="qcow2",
            open_backing=False,
            overwrite=True,
            force=True,
        ),
        lambda: cowhand.convert(
            tmp_path / "root", vm, "qcow2", backing=f"./{target}", backing_format="qcow2", overwrite=True, force=True
        ),
    ):
        with pytest.raises(ChainLoop) as caught:
            call()
        assert "-U" not in str(caught.value) and "-u" not in str(caught.value) and "--force" not in str(caught.value)
        assert vm.read_bytes() == before
    for words in (
        ("rebase", "-U", "-b", target, "-F", "qcow2"),
        ("rebase", "-u", "-U", "--force", "-b", target, "-F", "qcow2"),
        ("rebase", "--dry-run", "-b", target, "-F", "qcow2"),
    ):
        with pytest.raises(ChainLoop):
            in_process(*words, str(vm))
    with pytest.raises(ChainLoop):
        in_process(
            "create", "--dry-run", "--overwrite", "-f", "qcow2", "-u", "-b", f"./{target}", "-F", "qcow2", str(vm), "1M"
        )


def test_a_new_image_is_not_put_on_its_own_name(tmp_path: Path) -> None:
    for name in (
        "./new",
        str(tmp_path / "x" / ".." / "new"),
        f'json:{{"driver":"qcow2","file.filename":"{tmp_path}/new"}}',
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ChainLoop):
            cowhand.create(tmp_path / "new", "qcow2", MiB, backing=name, backing_format="qcow2", open_backing=False)
        assert not (tmp_path / "new").exists()


def test_what_cannot_be_looked_at_is_refused_told_and_forced(world: Path) -> None:
    (world / "instances" / "b" / "disk").unlink()
    damaged = image(world / "instances" / "b" / "damaged", MiB)
    data = bytearray(damaged.read_bytes())
    data[8:20] = b"\xff" * 12
    damaged.write_bytes(data)
    before = content(world / "_base" / "base")
    error = command("commit", "--output", "json", "instances/a/disk", cwd=world, status=9).error()
    assert error["code"] == "search-incomplete" and "instances/b/damaged" in error["message"]
    assert "--force" in error["hint"]
    assert content(world / "_base" / "base") == before
    plan = command("commit", "--dry-run", "--output", "json", "instances/a/disk", cwd=world).json()
    assert [item["path"] for item in plan["not-looked-at"]] == ["instances/b/damaged"]
    assert any(place.startswith("instances/a and below") for place in plan["looked-in"])
    assert "block devices" in plan["looked-in"]
    text = command("commit", "--dry-run", "instances/a/disk", cwd=world).stdout
    assert "looked in:" in text and "not looked at:" in text
    assert "instances/b/damaged" in command("commit", "--force", "instances/a/disk", cwd=world).stderr


def test_the_limit_means_that_it_is_not_known(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "instances" / "b" / "disk").unlink()
    monkeypatch.setattr(tree, "MAX_ENTRIES", 3)
    monkeypatch.setattr(tree.Tree.__init__, "__kwdefaults__", {"limit": 3})
    with pytest.raises(SearchIncomplete, match="more than 3"):
        cowhand.commit(world / "instances" / "a" / "disk")
    cowhand.commit(world / "instances" / "a" / "disk", force=True)


def test_one_operation_looks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers it goes through: every file is read once."""
    below = image(tmp_path / "layer0", MiB)
    for number in range(1, 6):
        below = image(tmp_path / f"layer{number}", backing=below)
    read: list[str] = []
    original = tree.read_links

    def counted(path: str, *rest: object) -> object:
        read.append(path)
        return original(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tree, "read_links", counted)
    cowhand.commit(below, str(tmp_path / "layer0"), guard=cowhand.DependentsGuard(force=True, warn=lambda text: None))
    here = [path for path in read if path.startswith(str(tmp_path))]
    assert len(here) == len(set(here)) == 6


def test_a_pool_that_is_known_is_looked_into(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = image(tmp_path / "base", MiB)
    top = image(tmp_path / "top", backing=base)
    pool = tmp_path_factory.mktemp("pool")
    make(pool / "sibling", "qcow2", backing=str(base), backing_format="qcow2")
    assert "sibling" in command("commit", top, status=9, COWHAND_POOLS=str(pool)).stderr
    with pytest.raises(OverlaysExist):
        cowhand.commit(top, guard=cowhand.DependentsGuard(look_in=[pool]))
    cowhand.commit(top)


def test_the_library_says_what_a_commit_would_do(world: Path) -> None:
    top = world / "instances" / "a" / "disk"
    before = top.read_bytes(), (world / "_base" / "base").read_bytes()
    plan = cowhand.plan_commit(str(top))
    assert plan.moves == MiB and plan.writes[0].path.endswith("_base/base") and plan.writes[0].bytes == MiB
    assert plan.dependents.paths == [str(world / "instances" / "b" / "disk")]
    assert (top.read_bytes(), (world / "_base" / "base").read_bytes()) == before
    look = cowhand.rebase(top, "", look=True)
    assert cowhand.plan_rebase(str(top), "", None, look).moves == 3 * MiB


def test_what_force_overrides_is_warned_of(world: Path) -> None:
    heard: list[str] = []
    guard = cowhand.DependentsGuard(force=True, warn=heard.append)
    cowhand.commit(world / "instances" / "a" / "disk", guard=guard)
    assert len(heard) == 1 and "instances/b/disk" in heard[0]


def test_a_rebase_that_misleads_a_link_in_another_folder_is_refused(world: Path) -> None:
    image(world / "instances" / "new", 4 * MiB)
    top = world / "instances" / "a" / "disk"
    cowhand.rebase(top, str(world / "_base" / "base"), "qcow2", unsafe=True)
    (world / "link").symlink_to(top)
    before = content(world / "link")
    with pytest.raises(OverlaysExist, match="link"):
        cowhand.rebase(top, "../new", "qcow2")
    assert content(world / "link") == before
    cowhand.rebase(top, str(world / "instances" / "new"), "qcow2")
    assert content(world / "link") == before


def test_the_chain_is_told_with_what_else_reads_through_it(world: Path) -> None:
    documents = command("info", "--chain", "--output", "json", "instances/a/disk", cwd=world).json()
    assert [item["other-overlays"] for item in documents] == [[], ["instances/b/disk"]]


@needs_root
@pytest.mark.root
@require_qemu
def test_an_overlay_on_a_loop_device_is_found_and_can_be_committed(tmp_path: Path) -> None:
    if find("losetup") is None:
        pytest.skip("needs losetup")
    base = image(tmp_path / "base", MiB)
    (tmp_path / "far").mkdir()
    (tmp_path / "far").chmod(0o1777)
    kept = tmp_path / "far" / "kept"
    with open(kept, "wb") as file:
        file.truncate(4 * MiB)
    made = run("losetup", "--find", "--show", str(kept), check=False)
    if made.status:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", device)
        top = image(tmp_path / "top", backing=base)
        with pytest.raises(OverlaysExist, match=device):
            cowhand.commit(top)
        top.unlink()
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", device)
        # The device and the file that it lies on are one image, and no sibling of itself.
        cowhand.commit(device, format="qcow2")
        assert content(base)[:65536] == bytes([7]) * 65536
    finally:
        run("losetup", "--detach", device, check=False)

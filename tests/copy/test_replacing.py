"""What replaces another file is whole or is not there: the old one keeps its name until the new one is complete."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import Cancelled, CowhandError, ImageInUse, NoSpace
from cowhand.core.progress import CancelToken, Progress
from cowhand.core.unfinished import SUFFIX, temporary_name
from cowhand.image.leftovers import hold_mark, sweep
from cowhand.image.new_file import NewFile, write_whole
from cowhand.image.replacing import reason_for_place
from tests.copy.mounts import needs_root, tmpfs

MIB = 1 << 20


@pytest.fixture
def raw(image_dir: Path, rng: random.Random) -> Path:
    path = image_dir / "new.raw"
    path.write_bytes(rng.randbytes(6 * MIB))
    return path


@pytest.fixture
def old(image_dir: Path, rng: random.Random) -> Path:
    path = image_dir / "old.qcow2"
    content = image_dir / "content"
    content.write_bytes(rng.randbytes(MIB))
    cowhand.convert(content, path, "qcow2")
    content.unlink()
    return path


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


class TestConvert:
    def test_an_interrupted_copy_leaves_the_old_image(self, raw: Path, old: Path) -> None:
        before = old.read_bytes()
        cancel = CancelToken()
        with pytest.raises(Cancelled):
            cowhand.convert(
                raw, old, "qcow2", overwrite=True, cancel=cancel, progress=Progress(0, lambda _: cancel.cancel())
            )
        assert old.read_bytes() == before
        assert names(old.parent) == {old.name, raw.name}

    def test_a_keyboard_interrupt_at_any_moment_leaves_the_old_image_or_the_new_one(self, raw: Path, old: Path) -> None:
        before = old.read_bytes()
        whole = raw.read_bytes()
        for step in range(1, 400, 23):
            _interrupt_after(step * 97, lambda: cowhand.convert(raw, old, "qcow2", overwrite=True))
            if old.read_bytes() != before:
                with cowhand.open(old) as disk:
                    assert disk.read(0, disk.size) == whole
            assert names(old.parent) == {old.name, raw.name}

    @needs_root
    def test_a_full_disk_leaves_the_old_image(self, raw: Path, old: Path, tmp_path: Path) -> None:
        with tmpfs(tmp_path / "small", "5m") as folder:
            target = folder / "vm.qcow2"
            target.write_bytes(old.read_bytes())
            with pytest.raises(NoSpace):
                cowhand.convert(raw, target, "qcow2", overwrite=True)
            assert target.read_bytes() == old.read_bytes()
            assert names(folder) == {"vm.qcow2"}

    def test_the_new_file_is_another_one_and_keeps_mode_and_attributes(self, raw: Path, old: Path) -> None:
        os.chmod(old, 0o640)
        try:
            os.setxattr(old, "user.note", b"mine")
        except OSError:
            pytest.skip("no extended attributes here")
        inode = old.stat().st_ino
        cowhand.convert(raw, old, "qcow2", overwrite=True)
        found = old.stat()
        assert found.st_ino != inode
        assert found.st_mode & 0o777 == 0o640
        assert os.getxattr(old, "user.note") == b"mine"

    @needs_root
    def test_the_owner_stays(self, raw: Path, old: Path) -> None:
        os.chown(old, 1234, 4321)
        cowhand.create(old, "qcow2", MIB, overwrite=True)
        assert (old.stat().st_uid, old.stat().st_gid) == (1234, 4321)

    def test_a_link_goes_on_leading_to_the_image(self, raw: Path, old: Path) -> None:
        link = old.parent / "link.qcow2"
        link.symlink_to(old.name)
        cowhand.convert(raw, link, "qcow2", overwrite=True)
        assert link.is_symlink()
        assert cowhand.compare(raw, old).identical

    def test_several_names_are_written_in_place_and_that_is_said(self, raw: Path, old: Path) -> None:
        other = old.parent / "other"
        os.link(old, other)
        heard: list[str] = []
        cowhand.convert(raw, old, "qcow2", overwrite=True, warn=heard.append)
        assert other.samefile(old)
        assert cowhand.compare(raw, other).identical
        assert any("in place" in text and "hard links" in text for text in heard)
        assert "hard links" in (reason_for_place(str(old)) or "")

    def test_an_image_in_use_is_not_replaced(self, raw: Path, old: Path) -> None:
        for writable in (True, False):
            with cowhand.open(old, writable=writable), pytest.raises(ImageInUse):
                cowhand.convert(raw, old, "qcow2", overwrite=True)
        assert names(old.parent) == {old.name, raw.name}

    def test_nobody_opens_for_writing_what_is_being_replaced(self, old: Path) -> None:
        with NewFile(str(old), replace=True), pytest.raises(ImageInUse):
            cowhand.open(old, writable=True)
        cowhand.open(old, writable=True).close()

    def test_image_and_data_file_are_replaced_together(self, raw: Path, image_dir: Path) -> None:
        vm, data = image_dir / "vm.qcow2", image_dir / "vm.data"
        options = {"data_file": str(data)}
        cowhand.convert(raw, vm, "qcow2", options=options)
        before = vm.read_bytes(), data.read_bytes()
        smaller = image_dir / "smaller"
        smaller.write_bytes(b"x" * MIB)
        cancel = CancelToken()
        with pytest.raises(Cancelled):
            cowhand.convert(
                smaller, vm, "qcow2", options=options, overwrite=True, cancel=cancel,
                progress=Progress(0, lambda _: cancel.cancel()),
            )  # fmt: skip
        assert (vm.read_bytes(), data.read_bytes()) == before
        cowhand.convert(smaller, vm, "qcow2", options=options, overwrite=True)
        assert cowhand.compare(smaller, vm).identical
        assert names(image_dir) == {"vm.qcow2", "vm.data", "new.raw", "smaller"}

    def test_a_copy_that_fails_leaves_no_data_file(self, raw: Path, image_dir: Path) -> None:
        cancel = CancelToken()
        with pytest.raises(Cancelled):
            cowhand.convert(
                raw, image_dir / "vm", "qcow2", options={"data_file": str(image_dir / "d")}, cancel=cancel,
                progress=Progress(0, lambda _: cancel.cancel()),
            )  # fmt: skip
        assert names(image_dir) == {raw.name}

    def test_a_creation_that_is_refused_leaves_the_old_image(self, old: Path) -> None:
        before = old.read_bytes()
        with pytest.raises(CowhandError):
            cowhand.create(old, "qcow2", 8 << 40, {"preallocation": "falloc"}, overwrite=True)
        assert old.read_bytes() == before
        assert names(old.parent) == {old.name}


def _interrupt_after(events: int, action: object) -> None:
    """Run *action* and raise KeyboardInterrupt in this thread at the given line of it."""
    left = events
    done = False

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal left, done
        left -= 1
        # What cleans up is not interrupted a second time: the first interrupt is over then.
        if not left and not done:
            done = True
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    assert callable(action)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    assert threading.active_count() < 10


class TestLeftovers:
    def test_what_a_killed_process_left_is_removed_by_the_next_run(self, raw: Path, image_dir: Path) -> None:
        script = (
            "import os, signal, cowhand; from cowhand.core.progress import Progress; "
            "cowhand.convert('new.raw', 'vm.qcow2', 'qcow2', progress=Progress(0, lambda _: os.kill(os.getpid(), signal.SIGKILL)))"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=image_dir)
        assert done.returncode == -signal.SIGKILL
        left = names(image_dir) - {raw.name}
        assert len(left) == 1
        assert all(name.startswith(".vm.qcow2.") and name.endswith(SUFFIX) for name in left)
        cowhand.convert(raw, image_dir / "another.qcow2", "qcow2")
        assert names(image_dir) == {raw.name, "another.qcow2"}

    def test_what_is_being_made_stays(self, image_dir: Path) -> None:
        with NewFile(str(image_dir / "vm")) as file:
            found = sweep(str(image_dir))
            assert os.path.exists(file.temporary)
            assert found == ([], [])

    def test_what_another_machine_made_is_only_told_of(self, image_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cowhand.core.unfinished.machine", lambda: "zzzz")
        name = temporary_name(str(image_dir / "vm"))
        monkeypatch.undo()
        Path(name).touch()
        assert sweep(str(image_dir)) == ([], [name])
        assert os.path.exists(name)

    def test_a_file_that_was_taken_for_a_leftover_is_made_anew(self, image_dir: Path) -> None:
        path = image_dir / "x"
        with open(path, "wb") as file:
            path.unlink()
            assert not hold_mark(file.fileno(), str(path))

    def test_an_object_that_nobody_holds_leaves_nothing(self, image_dir: Path) -> None:
        file = NewFile(str(image_dir / "vm"))
        del file
        assert names(image_dir) == set()


def test_small_files_are_written_whole(image_dir: Path) -> None:
    path = image_dir / "picture.svg"
    write_whole(str(path), b"one")
    write_whole(str(path), b"two", replace=True)
    assert path.read_bytes() == b"two"
    assert names(image_dir) == {path.name}


@pytest.mark.parametrize("size", [1, MIB, (1 << 30) + 512])
@pytest.mark.parametrize("options", [{}, {"cluster_size": "512"}, {"compat": "0.10"}])
def test_new_images_end_on_whole_sectors(image_dir: Path, size: int, options: dict[str, str]) -> None:
    path = image_dir / "a"
    cowhand.create(path, "qcow2", size, options)
    assert path.stat().st_size % 512 == 0
    cowhand.create(path, "qcow2", size, options, overwrite=True)
    cowhand.convert(path, image_dir / "b", "qcow2", options=options)
    assert (image_dir / "b").stat().st_size % 512 == 0
    assert cowhand.check(image_dir / "b").clean

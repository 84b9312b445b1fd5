"""Room, rights and locks are looked at before the first change, and errors name their cause."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowhand
from cowhand.block.locking.image_lock import NoLocks, missing_locks_allowed
from cowhand.core.errors import CowhandError, IOFailed, NoSpace
from cowhand.core.mounts import mount_of
from cowhand.jobs.commit import look_for_room
from tests.cli.command import cowhand as command
from tests.copy.mounts import loop, needs_root, tmpfs

MIB = 1 << 20


@contextmanager
def device(path: Path, size: int) -> Iterator[str]:
    with open(path, "wb") as file:
        file.truncate(size)
    done = subprocess.run(["losetup", "-f", "--show", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no loop devices")
    name = done.stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "-d", name], check=True)


def fill(path: Path | str, offset: int, length: int, value: int = 1, *, format: str | None = None) -> None:
    with cowhand.open(path, writable=True, format=format) as disk:
        for at in range(offset, offset + length, MIB):
            disk.write(at, bytes([value]) * min(MIB, offset + length - at))


def content(path: Path | str) -> bytes:
    with cowhand.open(path) as disk:
        return disk.read(0, disk.size)


@needs_root
class TestCommit:
    def test_a_device_that_is_too_small_is_told_before_and_stays(self, image_dir: Path) -> None:
        with device(image_dir / "dev", 12 * MIB) as dev:
            cowhand.create(dev, "qcow2", 32 * MIB, overwrite=True)
            fill(dev, 0, 4 * MIB)
            top = image_dir / "top"
            cowhand.create(top, "qcow2", backing=dev, backing_format="qcow2")
            fill(top, 2 * MIB, 12 * MIB, 2)
            before = content(dev)
            plan = command("commit", "--dry-run", top)
            assert "10 MiB are needed" in plan.stderr + plan.stdout or "needed" in plan.stderr
            with pytest.raises(NoSpace, match="needed") as caught:
                cowhand.commit(top, force=True)
            assert "free" in (caught.value.hint or "")
            assert content(dev) == before

    def test_what_just_fits_is_committed(self, image_dir: Path) -> None:
        # Header, refcounts, L1 and L2 take five clusters; the rest of the device is for data.
        with device(image_dir / "dev", 8 * MIB) as dev:
            cowhand.create(dev, "qcow2", 32 * MIB, overwrite=True)
            top = image_dir / "top"
            cowhand.create(top, "qcow2", backing=dev, backing_format="qcow2")
            with cowhand.open(top, writable=True) as disk:
                for cluster in range(8 * 16 - 5):
                    disk.write(cluster << 16, b"x" * 65536)
            expected = content(top)
            cowhand.commit(top, force=True)
            assert content(dev) == expected

    def test_a_full_file_system(self, image_dir: Path, tmp_path: Path) -> None:
        with tmpfs(tmp_path / "small", "6m") as folder:
            base, top = folder / "base.qcow2", image_dir / "top"
            cowhand.create(base, "qcow2", 32 * MIB)
            fill(base, 0, 4 * MIB)
            cowhand.create(top, "qcow2", backing=str(base), backing_format="qcow2")
            fill(top, 0, 9 * MIB, 2)
            before = base.read_bytes()
            with pytest.raises(NoSpace, match=r"5(\.\d+)? MiB are needed"):
                cowhand.commit(top, force=True)
            assert base.read_bytes() == before

    def test_what_has_its_place_already_needs_none(self, image_dir: Path, tmp_path: Path) -> None:
        with tmpfs(tmp_path / "small", "6m") as folder:
            base, top = folder / "base.raw", image_dir / "top"
            base.write_bytes(b"a" * 5 * MIB)
            cowhand.create(top, "qcow2", backing=str(base), backing_format="raw")
            fill(top, 0, 5 * MIB, 2)
            cowhand.commit(top, force=True)
            assert base.read_bytes() == b"\x02" * 5 * MIB

    def test_holes_of_a_raw_base_need_room(self, image_dir: Path, tmp_path: Path) -> None:
        with tmpfs(tmp_path / "small", "6m") as folder:
            base, top = folder / "base.raw", image_dir / "top"
            base.write_bytes(b"a" * 2 * MIB)
            os.truncate(base, 16 * MIB)
            cowhand.create(top, "qcow2", backing=str(base), backing_format="raw")
            fill(top, 0, 10 * MIB, 2)
            room = look_for_room(top)
            assert room is not None
            assert room.needed == 8 * MIB
            assert room.missing >= 4 * MIB
            with pytest.raises(NoSpace):
                cowhand.commit(top, force=True)
            assert base.read_bytes()[: 2 * MIB] == b"a" * 2 * MIB


@needs_root
class TestOthers:
    def test_rebase_compares_where_it_may_not_fit(self, image_dir: Path, tmp_path: Path) -> None:
        base = image_dir / "base.raw"
        base.write_bytes(bytes(6 * MIB) + b"a" * 2 * MIB + bytes(8 * MIB))
        with tmpfs(tmp_path / "small", "5m") as folder:
            top = folder / "top.qcow2"
            cowhand.create(top, "qcow2", backing=str(base), backing_format="raw")
            cowhand.rebase(top, None)
            assert content(top) == base.read_bytes()

    def test_rebase_is_refused_before_anything_is_written(self, image_dir: Path, tmp_path: Path) -> None:
        base = image_dir / "base.raw"
        base.write_bytes(b"a" * 12 * MIB)
        with tmpfs(tmp_path / "small", "5m") as folder:
            top = folder / "top.qcow2"
            cowhand.create(top, "qcow2", backing=str(base), backing_format="raw")
            before = top.read_bytes()
            with pytest.raises(NoSpace, match="needed"):
                cowhand.rebase(top, None)
            assert top.read_bytes() == before

    def test_converting_into_an_image_that_exists(self, image_dir: Path, tmp_path: Path, rng: random.Random) -> None:
        source, zeroes = image_dir / "s.raw", image_dir / "z.raw"
        source.write_bytes(rng.randbytes(8 * MIB))
        zeroes.write_bytes(bytes(7 * MIB) + b"a" * MIB)
        with tmpfs(tmp_path / "small", "5m") as folder:
            target = folder / "t.qcow2"
            cowhand.create(target, "qcow2", 8 * MIB)
            fill(target, 0, MIB)
            before = target.read_bytes()
            with pytest.raises(NoSpace, match="needed"):
                cowhand.convert(source, target, "qcow2", skip_create=True)
            assert target.read_bytes() == before
            cowhand.convert(zeroes, target, "qcow2", skip_create=True)
            assert content(target) == zeroes.read_bytes()

    def test_converting_onto_a_device_keeps_what_is_there_where_it_does_not_fit(
        self, image_dir: Path, rng: random.Random
    ) -> None:
        source = image_dir / "s.raw"
        source.write_bytes(rng.randbytes(8 * MIB))
        with device(image_dir / "dev", 4 * MIB) as dev:
            cowhand.create(dev, "qcow2", 4 * MIB, overwrite=True)
            before = Path(dev).read_bytes()
            heard: list[str] = []
            with pytest.raises(NoSpace):
                cowhand.convert(source, dev, "qcow2", overwrite=True, warn=heard.append)
            assert Path(dev).read_bytes() == before
            small = image_dir / "z.raw"
            small.write_bytes(bytes(7 * MIB) + b"a" * MIB)
            cowhand.convert(small, dev, "qcow2", overwrite=True, warn=heard.append)
            assert content(dev) == small.read_bytes()
            assert any("in place" in text and "device" in text for text in heard)

    def test_preallocation_says_how_much_is_missing(self, tmp_path: Path) -> None:
        with tmpfs(tmp_path / "small", "5m") as folder, pytest.raises(NoSpace) as caught:
            cowhand.create(folder / "a", "raw", 64 * MIB, {"preallocation": "falloc"})
        assert "missing" in str(caught.value)


class TestCauses:
    def test_a_limit_of_the_process_is_named(self, image_dir: Path) -> None:
        (image_dir / "s.raw").write_bytes(b"a" * 2 * MIB)
        done = subprocess.run(
            [sys.executable, "-m", "cowhand", "convert", "s.raw", "t.raw"], cwd=image_dir, capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)),
        )  # fmt: skip
        assert done.returncode == 3
        assert "ulimit -f" in done.stderr
        assert not (image_dir / "t.raw").exists()

    @needs_root
    def test_a_file_system_that_holds_no_such_file_is_named(self, tmp_path: Path) -> None:
        with loop(tmp_path / "old", "ext2", 20 * MIB) as folder:
            with pytest.raises(CowhandError) as caught:
                cowhand.create(folder / "x.raw", "raw", 40 << 30)
            assert "the file system (ext2" in str(caught.value).replace("The", "the")
            (folder / "lost+found").rmdir()
            assert list(folder.iterdir()) == []

    @needs_root
    def test_a_read_only_file_system_is_named(self, tmp_path: Path) -> None:
        with tmpfs(tmp_path / "ro", "5m") as folder:
            cowhand.create(folder / "a.qcow2", "qcow2", MIB)
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            for action in (
                lambda: cowhand.create(folder / "b.qcow2", "qcow2", MIB),
                lambda: cowhand.create(folder / "a.qcow2", "qcow2", MIB, overwrite=True),
                lambda: cowhand.open(folder / "a.qcow2", writable=True),
            ):
                with pytest.raises(CowhandError) as caught:
                    action()
                assert "read-only" in str(caught.value)

    @needs_root
    def test_no_inodes_are_not_no_space(self, tmp_path: Path) -> None:
        folder = tmp_path / "few"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m,nr_inodes=2", "tmpfs", folder], check=True)
        try:
            (folder / "one").touch()
            with pytest.raises(NoSpace, match="no inodes"):
                cowhand.create(folder / "b.qcow2", "qcow2", MIB)
        finally:
            subprocess.run(["umount", folder], check=True)

    def test_the_file_system_of_a_path_is_the_nearest_mount(self) -> None:
        mount = mount_of("/proc/self/status")
        assert mount is not None
        assert mount.kind == "proc"


class TestWithoutLocks:
    @pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
    def no_locks(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        real = fcntl.fcntl

        def without(fd: int, command: int, argument: object = 0) -> object:
            if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLKW):
                raise OSError(request.param, os.strerror(request.param))
            return real(fd, command, argument)  # type: ignore[arg-type]

        monkeypatch.setattr(fcntl, "fcntl", without)

    def test_new_images_are_made(self, no_locks: None, image_dir: Path, rng: random.Random) -> None:
        source = image_dir / "s.raw"
        source.write_bytes(rng.randbytes(MIB))
        cowhand.create(image_dir / "a.qcow2", "qcow2", MIB)
        cowhand.convert(source, image_dir / "b.qcow2", "qcow2")
        cowhand.convert(source, image_dir / "b.qcow2", "qcow2", overwrite=True)
        assert cowhand.compare(source, image_dir / "b.qcow2").identical

    def test_images_that_exist_are_refused_with_a_way_on(self, no_locks: None, image_dir: Path) -> None:
        path = image_dir / "a.qcow2"
        cowhand.create(path, "qcow2", MIB)
        with pytest.raises(NoLocks, match="has no locks") as caught:
            cowhand.open(path, writable=True)
        assert "--no-locks" in (caught.value.hint or "")
        assert "file.locking=off" in (caught.value.hint or "")
        cowhand.open(path, writable=True, options={"file.locking": "off"}).close()
        with missing_locks_allowed():
            cowhand.open(path, writable=True).close()
        with pytest.raises(NoLocks):
            cowhand.open(path, writable=True)
        cowhand.open(path).close()

    def test_the_command_goes_on_when_told(self, image_dir: Path) -> None:
        (image_dir / "sitecustomize.py").write_text(
            "import errno, fcntl\nreal = fcntl.fcntl\n"
            "def without(fd, command, argument=0):\n"
            "    if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK): raise OSError(errno.ENOLCK, 'none')\n"
            "    return real(fd, command, argument)\nfcntl.fcntl = without\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(image_dir)}

        def run(*words: str) -> int:
            line = [sys.executable, "-m", "cowhand", *words]
            return subprocess.run(line, cwd=image_dir, env=environment, capture_output=True).returncode

        assert run("create", "a.qcow2", "1M") == 0
        assert run("resize", "a.qcow2", "2M") == 1
        assert run("resize", "--no-locks", "a.qcow2", "2M") == 0
        assert run("locks", "a.qcow2") == 0
        assert run("check", "a.qcow2") == 0


def test_a_file_that_may_not_be_written_is_not_replaced_either(image_dir: Path) -> None:
    path = image_dir / "a.qcow2"
    cowhand.create(path, "qcow2", MIB)
    os.chmod(path, 0o444)
    if os.geteuid():
        with pytest.raises(CowhandError):
            cowhand.create(path, "qcow2", MIB, overwrite=True)
        return
    os.chmod(image_dir, 0o777)
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534); import cowhand\n"
        "try: cowhand.create('a.qcow2', 'qcow2', 1 << 20, overwrite=True)\n"
        "except PermissionError as error: print(error)\n"
    )
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", script], cwd=image_dir, capture_output=True, text=True)
    if "Permission denied: '" in done.stderr or "ModuleNotFound" in done.stderr:
        pytest.skip("the interpreter is not to be reached by another user")
    assert "a.qcow2" in done.stdout, done.stderr
    assert path.read_bytes() == before


def test_raised_as_what_it_is() -> None:
    assert issubclass(NoSpace, IOFailed)

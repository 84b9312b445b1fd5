"""``cowhand locks``: real QEMU processes hold images, and are named with what they hold."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import cowhand
from tests.cli.images import image
from tests.tools.patience import PATIENCE
from tests.tools.programs import find
from tests.tools.qemu import require_qemu, require_qemu_nbd

pytestmark = pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="needs open-file-description locks")


@pytest.fixture
def path(image_dir: Path) -> Path:
    image(image_dir / "a")
    return image_dir / "a"


@contextmanager
def holding(path: Path, *command: str) -> Iterator[int]:
    """Run a program that holds *path*, until it does; yield its number."""
    found = find(command[0])
    assert found is not None
    process = subprocess.Popen([found, *command[1:]], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while not any(one["locks"] for one in holders(path)):
            assert process.poll() is None and time.monotonic() < end, "it holds nothing"
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def holders(path: Path) -> list[dict[str, object]]:
    from cowhand.block.locking.holders import lock_holders
    from cowhand.cli.commands.locks import _document

    return [_document(one) for one in lock_holders(path)]


@require_qemu
def test_a_writer_is_named(path: Path) -> None:
    with holding(path, "qemu-io", str(path)) as pid:
        (held,) = cowhand("locks", "--output", "json", path, status=5).json()
        (one,) = held["holders"]
        assert (one["pid"], one["program"], one["access"]) == (pid, "qemu-io", "read and write")
        assert one["command"][-1] == str(path)
        assert {"consistent read", "write"} <= set(one["uses"]) and {"write", "resize"} <= set(one["refuses"])
        locked = {byte for lock in one["locks"] for byte in range(lock["first"], lock["last"] + 1)}
        assert {100, 101, 201, 203} <= locked and {lock["mode"] for lock in one["locks"]} == {"read"}
        text = cowhand("locks", path, status=5).stdout.splitlines()
        assert text[0] == f"{path}:" and text[2].split()[:2] == [str(pid), "qemu-io"]
        assert str(path) in text[3]
    assert cowhand("locks", path).stdout == f"{path}: not open in any program\n"


@require_qemu_nbd
def test_a_reader_lets_others_read(path: Path, image_dir: Path) -> None:
    with holding(path, "qemu-nbd", "-r", "-t", "-k", str(image_dir / "socket"), str(path)) as pid:
        (held,) = cowhand("locks", "--output", "json", path, status=5).json()
        (one,) = held["holders"]
        assert (one["pid"], one["program"], one["access"]) == (pid, "qemu-nbd", "read")
        assert one["uses"] == ["consistent read"] and one["refuses"] == ["write", "resize"]


@require_qemu
def test_a_chain(path: Path, image_dir: Path) -> None:
    cowhand("create", "-f", "qcow2", "-b", "a", "-F", "qcow2", "top.qcow2", cwd=image_dir)
    with holding(path, "qemu-io", "-r", str(image_dir / "top.qcow2")):
        found = cowhand("locks", "--chain", "--output", "json", "top.qcow2", cwd=image_dir, status=5).json()
        assert [len(one["holders"]) for one in found] == [1, 1]


def test_who_takes_no_locks_is_told_of(path: Path) -> None:
    with path.open("r+b") as file:
        (held,) = cowhand("locks", "--output", "json", path, status=5).json()
        (one,) = held["holders"]
        assert (one["pid"], one["uses"], one["locks"], one["access"]) == (os.getpid(), [], [], "read and write")
        assert "no image locks" in cowhand("locks", path, status=5).stdout
        fcntl.lockf(file, fcntl.LOCK_EX)
        (held,) = cowhand("locks", "--output", "json", path, status=5).json()
        assert held["holders"][0]["locks"][0] == {"first": 0, "last": (1 << 63) - 1, "mode": "write"}


def test_what_is_no_file(path: Path) -> None:
    assert cowhand("locks", path.with_name("none"), "--output", "json", status=1).error()["code"] == "not-found"
    assert "not a file on this machine" in cowhand("locks", "nbd://host/x", status=1).stderr


def test_who_may_not_read_an_image_is_not_told_that_nobody_has_it_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cowhand.block.locking import holders as lockholders, image_lock
    from cowhand.core.errors import AccessDenied

    def refused(*ignored: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_lock, "locked_bytes", refused)
    with pytest.raises(AccessDenied):
        lockholders.lock_holders(path)

"""``kill -9`` at random moments of every command loses nothing that existed before the command was started.

What is looked at afterwards: every file that the command only reads is the same to the byte; every image that it writes opens, checks
without damage, and reads as before or as after the command, never as anything else; a target that was to be made is either not there or
complete. Lost clusters are allowed. So are flags that do not fit their counts yet, which a snapshot has to change in many places: they say "may be
written in place" of clusters that nobody else refers to, or the reverse; a check counts them, and a repair fits them.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import cowhand as library
from cowhand.image.check import check
from cowhand.image.new_file import is_unfinished
from tests.cli.command import cowhand, start
from tests.cli.images import MiB, content, fill, image
from tests.tools.patience import PATIENCE

SIZE = 24 * MiB
#: Kills of each command, and of one that only reads; the seed is the test's name, COWHAND_SEED gives others.
KILLS, KILLS_OF_READERS = 8, 3


@dataclass(frozen=True, slots=True)
class Case:
    """A command, the images that it may write, and the target that it makes."""

    arguments: tuple[str, ...]
    writes: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = field(default=lambda folder: None)


def _snapshot_before(folder: Path) -> None:
    cowhand("snapshot", "create", "top.qcow2", "before", cwd=folder)
    fill(folder / "top.qcow2", 3 * MiB, 6 * MiB, 9)


def _other(folder: Path) -> None:
    """Make an image that is to be replaced, whole or not at all."""
    fill(image(folder / "other.qcow2", SIZE), MiB, 9 * MiB, 7)


CASES = {
    "create": Case(("create", "-f", "qcow2", "-o", "preallocation=metadata", "new.qcow2", "40G"), makes=("new.qcow2",)),
    "create over a base": Case(
        ("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new.qcow2"), makes=("new.qcow2",)
    ),
    "info": Case(("info", "--chain", "top.qcow2")),
    "map": Case(("map", "top.qcow2")),
    "check": Case(("check", "top.qcow2")),
    "compare": Case(("compare", "top.qcow2", "disk.raw")),
    "measure": Case(("measure", "-O", "qcow2", "top.qcow2")),
    "convert": Case(("convert", "-O", "qcow2", "disk.raw", "new.qcow2"), makes=("new.qcow2",)),
    "convert compressed": Case(("convert", "-c", "-O", "qcow2", "top.qcow2", "new.qcow2"), makes=("new.qcow2",)),
    "convert to raw": Case(("convert", "-O", "raw", "top.qcow2", "new.raw"), makes=("new.raw",)),
    "dd": Case(("dd", "-O", "qcow2", "if=disk.raw", "of=new.qcow2", "bs=1M", "count=20"), makes=("new.qcow2",)),
    "convert over another": Case(
        ("convert", "--overwrite", "-O", "qcow2", "disk.raw", "other.qcow2"), writes=("other.qcow2",), prepare=_other
    ),
    "create over another": Case(
        ("create", "--overwrite", "-o", "preallocation=metadata", "other.qcow2", "40G"),
        writes=("other.qcow2",),
        prepare=_other,
    ),
    "resize": Case(("resize", "top.qcow2", "900G"), writes=("top.qcow2",)),
    "snapshot create": Case(
        ("snapshot", "create", "top.qcow2", "now"), writes=("top.qcow2",), prepare=_snapshot_before
    ),
    "snapshot apply": Case(
        ("snapshot", "apply", "top.qcow2", "before"), writes=("top.qcow2",), prepare=_snapshot_before
    ),
    "snapshot delete": Case(
        ("snapshot", "delete", "top.qcow2", "before"), writes=("top.qcow2",), prepare=_snapshot_before
    ),
    "check and repair": Case(("check", "-r", "all", "top.qcow2"), writes=("top.qcow2",)),
    "commit": Case(("commit", "top.qcow2"), writes=("top.qcow2",)),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with base ← top and a raw disk, which tests copy."""
    folder = tmp_path_factory.mktemp("original")
    generator = random.Random(5)
    base = image(folder / "base.qcow2", SIZE)
    top = image(folder / "top.qcow2", backing=base)
    for path, stretches in ((base, 30), (top, 40)):
        with library.open(path, writable=True) as disk:
            for _ in range(stretches):
                length = generator.randrange(1, 600_000)
                disk.write(generator.randrange(SIZE - length), generator.randbytes(length))
    (folder / "disk.raw").write_bytes(content(top))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(name: str, original: Path, tmp_path: Path, rng: random.Random) -> None:
    case = CASES[name]
    ready = tmp_path / "ready"
    shutil.copytree(original, ready)
    case.prepare(ready)
    done = tmp_path / "done"
    shutil.copytree(ready, done)
    begin = time.monotonic()
    with start(*case.arguments, cwd=done) as process:
        process.communicate(timeout=PATIENCE)
    took = time.monotonic() - begin
    killed = attempt = 0
    known = Known()
    wanted = KILLS if case.writes or case.makes else KILLS_OF_READERS
    while attempt < wanted or (not killed and attempt < 3 * wanted):
        attempt += 1
        folder = tmp_path / f"attempt{attempt}"
        shutil.copytree(ready, folder)
        with start(*case.arguments, cwd=folder) as process:
            time.sleep(rng.uniform(0.2, 1.05) * took)
            process.kill()
            process.communicate(timeout=PATIENCE)
        if process.returncode == -9:
            killed += 1
        else:
            took *= 0.7  # the machine has become faster, or the first one had to compile
        _judge(case, folder, ready, done, known)
        shutil.rmtree(folder)
    assert killed, "no attempt was killed before its end"


class Known:
    """What files and disks hold that do not change between two attempts."""

    def __init__(self) -> None:
        self.file = cache(Path.read_bytes)
        self.disk = cache(content_or_size)


def _judge(case: Case, folder: Path, ready: Path, done: Path, known: Known) -> None:
    for old in ready.iterdir():
        if old.name in case.writes or (case.arguments[0] == "commit" and old.name == "base.qcow2"):
            continue
        assert (folder / old.name).read_bytes() == known.file(old), f"{old.name} was only to be read"
    for name in case.writes:
        _judge_written(name, folder, ready, done, known)
    if case.arguments[0] == "commit":
        _assert_undamaged(folder / "base.qcow2")
    for name in case.makes:
        if (folder / name).exists():
            assert content_or_size(folder / name) == known.disk(done / name), "a target is there that is not complete"
    left = {path.name for path in folder.iterdir()} - {path.name for path in ready.iterdir()} - set(case.makes)
    assert all(is_unfinished(name) for name in left), f"left behind: {left}"


def _assert_undamaged(path: Path) -> None:
    found = check(path)
    damage = [line for line in found.messages if line.startswith("ERROR") and "OFLAG_COPIED" not in line]
    assert not damage and not found.check_errors and found.failure is None, found.messages
    if found.corruptions:
        before = content_or_size(path)
        assert check(path, repair="all").clean
        assert content_or_size(path) == before


def _judge_written(name: str, folder: Path, ready: Path, done: Path, known: Known) -> None:
    _assert_undamaged(folder / name)
    before, after = known.disk(ready / name), known.disk(done / name)
    assert content_or_size(folder / name) in (before, after), f"{name} reads as neither before nor after the command"


def content_or_size(path: Path) -> bytes:
    """Return what a disk holds: all bytes of a small one; the beginning and the length of one that was made huge."""
    with library.open(path, format="raw" if path.suffix == ".raw" else "qcow2") as disk:
        return disk.read(0, min(disk.size, SIZE)) + disk.size.to_bytes(8, "big")

"""Repairs with an undo log, and their undoing, on a medium that fails at each step in turn: the way back stays open, or nothing was changed."""

from __future__ import annotations

import builtins
import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cowhand.block.disk import Disk
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError, InvalidFormat, IOFailed, NoSpace, NotSupported
from cowhand.image.repair import plan, undo_log
from cowhand.image.repair.undo_log import UndoLog, play, write_log
from cowhand.image.shadow.recording import RehearsalNode
from cowhand.testing.faults import ALL, CHANGES, FLUSH, HALF, NOTHING, READ, TRUNCATE, WRITE, FaultNode
from tests.hostile import layout

_SECTOR = 512


class Case(NamedTuple):
    """A damaged image, what a repair of everything does to it, and the log of that."""

    before: bytes
    rehearsal: RehearsalNode
    log: Path


def _damaged(kind: str) -> bytes:
    """Return an image that a repair changes in many places; "rebuilt" needs a new refcount structure, "longer" a longer file."""
    image = layout.make(9)
    data = bytearray(image.data)
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    if kind == "rebuilt":
        data[table : table + 8] = bytes(8)
    elif kind == "longer":
        data[table + 8 : table + 16] = (len(data) + 512 * 40).to_bytes(8, "big")
    else:
        rng = random.Random(7)
        for at in range(block + 8, block + 120, 2):
            data[at : at + 2] = rng.choice((b"\0\1", b"\0\2", b"\0\0"))
    return bytes(data)


@pytest.fixture(params=["counts", "rebuilt", "longer"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    before = _damaged(request.param)
    with Disk(MemoryNode(content=before)) as source:
        rehearsal = RehearsalNode(source.root)
        with Disk(rehearsal):
            plan.rehearse(rehearsal, "all", "qcow2")
            assert rehearsal.changed
            log = tmp_path / "log"
            write_log(str(log), source, "image", rehearsal)
            yield Case(before, rehearsal, log)


def _undo(medium: MemoryNode, case: Case) -> None:
    """Undo on a medium that is whole again; the image is as before the repair then."""
    with Disk(medium.copy(), writable=True) as disk:
        undo = UndoLog(str(case.log))
        if undo.verify(disk, None):
            undo.apply(disk)
        assert not undo.verify(disk, None), "something is left to be undone"
        content = bytearray(disk.root.size)
        disk.edge.read_into(0, content)
    assert bytes(content) == case.before


def _each_step(
    begin: MemoryNode, work: Callable[[Disk], object], judge: Callable[[MemoryNode], None], done: float, number: int
) -> int:
    """Let *work* meet a failure at each of its requests in turn; *judge* what that leaves. Return how many there were."""
    medium = FaultNode(begin.copy(), sector=_SECTOR)
    with Disk(medium, writable=True) as disk:
        medium.reset()
        work(disk)
        kinds = [kind for kind in medium.kinds if kind in CHANGES]
    assert {WRITE, FLUSH} <= set(kinds)
    for nth in range(1, len(kinds) + 1):
        inner = begin.copy()
        medium = FaultNode(inner, sector=_SECTOR)
        keeper = Disk(inner, name="keeper")
        disk = Disk(medium, writable=True)
        medium.fail(CHANGES, nth, number, lasting=True, done=done)
        with pytest.raises(IOFailed) as caught:
            work(disk)
        assert isinstance(caught.value, NoSpace) == (number == errno.ENOSPC)
        medium.cut_power()  # and what is closed later does not reach it either
        try:
            disk.close()
        except CowhandError:
            pass
        judge(inner)
        keeper.close()
    return len(kinds)


@pytest.mark.parametrize(("done", "number"), [(NOTHING, errno.EIO), (HALF, errno.EIO), (ALL, errno.ENOSPC)])
def test_a_repair_that_fails_anywhere_can_be_undone(case: Case, done: float, number: int) -> None:
    begin = MemoryNode(content=case.before)
    steps = _each_step(begin, lambda disk: play(disk, case.rehearsal), lambda left: _undo(left, case), done, number)
    assert steps > 3


@pytest.mark.parametrize(("done", "number"), [(NOTHING, errno.EIO), (HALF, errno.EIO), (ALL, errno.ENOSPC)])
def test_an_undoing_that_fails_anywhere_can_be_done_again(case: Case, done: float, number: int) -> None:
    repaired = MemoryNode(content=case.before)
    with Disk(repaired.copy(), writable=True) as disk:
        play(disk, case.rehearsal)
        content = bytearray(disk.root.size)
        disk.edge.read_into(0, content)
    begin = MemoryNode(content=bytes(content))
    steps = _each_step(
        begin, lambda disk: UndoLog(str(case.log)).apply(disk), lambda left: _undo(left, case), done, number
    )
    assert steps >= 3 + (len(content) > len(case.before))


def test_what_cannot_be_read_is_not_undone(case: Case) -> None:
    inner = MemoryNode(content=case.before)
    with Disk(inner.copy(), writable=True) as disk:
        play(disk, case.rehearsal)
        medium = FaultNode(disk.root)
        undo = UndoLog(str(case.log))
        with Disk(medium, writable=True) as faulty:
            medium.reset()
            undo.verify(faulty, None)
            for nth in range(1, medium.counts[READ] + 1):
                medium.reset()
                medium.fail(READ, nth)
                with pytest.raises(IOFailed):
                    undo.verify(faulty, None)
                assert not medium.counts[WRITE] and not medium.counts[TRUNCATE]


# -- the log itself


class _Limited:
    """The file of a log on a medium that is full after so many calls."""

    def __init__(self, file: Any, calls: list[int]) -> None:
        self._file = file
        self._calls = calls

    def _count(self) -> None:
        self._calls[0] -= 1
        if self._calls[0] < 0:
            raise OSError(errno.ENOSPC, "injected")

    def write(self, data: bytes) -> int:
        self._count()
        return int(self._file.write(data))

    def flush(self) -> None:
        self._count()
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Limited:
        return self

    def __exit__(self, *problem: object) -> None:
        self._file.close()


def _repair_with_calls(path: Path, log: Path, calls: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Repair while *calls* writes to the log succeed; return how many are left."""
    left = [calls]

    def limited(name: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        file = builtins.open(name, mode, *more, **named)  # noqa: SIM115 - for the caller to close
        # The log is written by its descriptor: it has its name when it is whole.
        return _Limited(file, left) if isinstance(name, int) and mode != "rb" else file

    with monkeypatch.context() as patch:
        patch.setattr(undo_log, "open", limited, raising=False)
        plan.repair_logged(str(path), "all", str(log), format="qcow2")
    return left[0]


def test_a_log_that_does_not_fit_changes_nothing_and_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "image", tmp_path / "log"
    before = _damaged("counts")
    path.write_bytes(before)
    needed = 1000 - _repair_with_calls(path, log, 1000, monkeypatch)
    repaired = path.read_bytes()
    assert needed > 5 and repaired != before
    for calls in range(needed):
        path.write_bytes(before)
        log.unlink(missing_ok=True)
        with pytest.raises(NoSpace):
            _repair_with_calls(path, log, calls, monkeypatch)
        if not log.exists():
            assert path.read_bytes() == before
            continue
        # Only the note that the repair is done was lost: it can be undone all the same.
        assert path.read_bytes() == repaired and calls >= needed - 2
        assert plan.undo_repair(str(log), str(path))
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "torn", [b"\nd", b"\ndone ", b"\ndone 17", b"\ndone \n", b"\ndone 99999999999999999999\n\nundoing\n"]
)
def test_a_note_that_a_crash_cut_off_counts_for_nothing(torn: bytes, tmp_path: Path) -> None:
    path, log = tmp_path / "image", tmp_path / "log"
    before = _damaged("counts")
    path.write_bytes(before)
    plan.repair_logged(str(path), "all", str(log), format="qcow2")
    whole = log.read_bytes()
    log.write_bytes(whole[: whole.rindex(b"\ndone ")] + torn)
    if torn == b"\ndone \n":
        with pytest.raises(undo_log.ImageChanged):
            plan.undo_repair(str(log), str(path))
    assert plan.undo_repair(str(log), str(path), force=torn == b"\ndone \n")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b'{"image": "x", "size": 1e999}', b'{"size": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"null"],
)
def test_a_hostile_log_is_refused(header: bytes, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"cowhand undo log 1\n" + header + b"\n")
    with pytest.raises(InvalidFormat):
        UndoLog(str(log))


def test_a_log_that_nobody_could_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, log = tmp_path / "image", tmp_path / "log"
    path.write_bytes(_damaged("counts"))
    before = path.read_bytes()
    monkeypatch.setattr(undo_log, "_MAX_HEADER", 200)
    with pytest.raises(NotSupported, match="so many places"):
        plan.repair_logged(str(path), "all", str(log), format="qcow2")
    assert path.read_bytes() == before and not log.exists()

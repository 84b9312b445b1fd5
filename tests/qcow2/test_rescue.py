"""Repairs that are planned, logged and undone, over images damaged at random."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError, InvalidFormat
from cowhand.image.check import check
from cowhand.image.repair import plan as rescue
from cowhand.image.repair.undo_log import ImageChanged, UndoLog, UndoLogUsed, play, write_log
from cowhand.image.shadow.recording import RehearsalNode
from cowhand.testing.recorder import RecorderNode
from cowhand.testing.replay import CrashState, prefixes, replay, sampled
from tests.qcow2 import damage
from tests.tools.qemu import qemu_img, require_qemu

pytestmark = require_qemu


def damaged(folder: Path, seed: int) -> Path:
    rng = random.Random(seed)
    path = folder / "image"
    damage.make(path, rng, bitmaps=False)
    data = bytearray(path.read_bytes())
    damage.damage(data, rng)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("seed", range(12))
def test_a_logged_repair_is_the_repair_and_can_be_undone(tmp_path: Path, seed: int) -> None:
    path = damaged(tmp_path, seed)
    before = path.read_bytes()
    plain = tmp_path / "plain"
    shutil.copy(path, plain)
    log = tmp_path / "log"
    try:
        plan = rescue.plan_repair(str(path), "all", format="qcow2")
        assert path.read_bytes() == before, "a plan writes nothing"
        result, changed = rescue.repair_logged(str(path), "all", str(log), format="qcow2")
    except CowhandError:
        with pytest.raises(CowhandError):
            check(plain, format="qcow2", repair="all")
        assert path.read_bytes() == before
        return
    wanted = check(plain, format="qcow2", repair="all")
    assert damage.counts_of(result) == damage.counts_of(wanted)
    longer = max(len(plain.read_bytes()), len(path.read_bytes()))
    assert path.read_bytes().ljust(longer, b"\0") == plain.read_bytes().ljust(longer, b"\0")
    assert changed == log.exists() == bool(plan.writes)
    if not changed:
        return
    assert rescue.undo_repair(str(log), str(path))
    assert path.read_bytes() == before
    with pytest.raises(UndoLogUsed):
        rescue.undo_repair(str(log), str(path), force=True)
    # A crash came between the last byte and the note.
    log.write_bytes(log.read_bytes().removesuffix(b"\nundone\n"))
    assert not rescue.undo_repair(str(log), str(path)), "nothing is left to be undone"
    with pytest.raises(UndoLogUsed):
        rescue.undo_repair(str(log), str(path))
    assert path.read_bytes() == before


def _leaking(folder: Path) -> Path:
    path = folder / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    data[block + 20 : block + 22] = b"\0\1"
    path.write_bytes(data.ljust(11 << 16, b"\0"))
    return path


def test_an_image_that_was_written_since_is_refused(tmp_path: Path) -> None:
    path, log = _leaking(tmp_path), tmp_path / "log"
    rescue.repair_logged(str(path), "leaks", str(log))
    repaired = path.read_bytes()
    times = path.stat()
    # Metadata that the repair only read, its time put back: the content tells.
    with path.open("r+b") as file:
        file.seek(24)
        file.write((9 << 20).to_bytes(8, "big"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ImageChanged):
        rescue.undo_repair(str(log), str(path), force=True)
    # Only a new time: refused, unless somebody insists.
    path.write_bytes(repaired)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000_000))
    with pytest.raises(ImageChanged, match="written after the repair"):
        rescue.undo_repair(str(log), str(path))
    assert rescue.undo_repair(str(log), str(path), force=True)


def test_a_log_that_is_damaged_or_cut_changes_nothing(tmp_path: Path) -> None:
    path, log = _leaking(tmp_path), tmp_path / "log"
    rescue.repair_logged(str(path), "leaks", str(log))
    repaired, whole = path.read_bytes(), log.read_bytes()
    for end in (0, 5, 25, 200, len(whole) // 2):
        log.write_bytes(whole[:end])
        with pytest.raises(InvalidFormat):
            rescue.undo_repair(str(log), str(path))
    rng = random.Random(1)
    body = whole.rindex(b"done ")
    for _ in range(40):
        data = bytearray(whole)
        data[rng.randrange(body)] ^= 1 << rng.randrange(8)
        log.write_bytes(data)
        with pytest.raises(CowhandError):
            rescue.undo_repair(str(log), str(path))
    assert path.read_bytes() == repaired


@pytest.mark.parametrize("seed", [2, 3, 5, 8])
def test_a_power_failure_in_the_middle_can_be_undone_too(tmp_path: Path, seed: int) -> None:
    path = damaged(tmp_path, seed)
    before = path.read_bytes()
    memory = MemoryNode(content=before)
    with Disk(memory.copy()) as source:
        rehearsal = RehearsalNode(source.root)
        with Disk(rehearsal):
            try:
                rescue.rehearse(rehearsal, "all", "qcow2")
            except CowhandError:
                pytest.skip("this image cannot be opened")
            if not rehearsal.changed:
                pytest.skip("nothing to repair")
            log = tmp_path / "log"
            write_log(str(log), source, str(path), rehearsal)
            recorder = RecorderNode(memory, sector=512)
            with Disk(recorder, writable=True) as target:
                play(target, rehearsal)
                undo = UndoLog(str(log))
                undo.verify(target, None)
                undo.apply(target)
            history = recorder.log

    def judge(state: CrashState) -> None:
        with Disk(state.image, writable=True) as disk:
            if UndoLog(str(log)).verify(disk, None):
                undo.apply(disk)
            content = bytearray(disk.root.size)
            disk.edge.read_into(0, content)
        assert content.rstrip(b"\0") == before.rstrip(b"\0")

    assert replay(prefixes(history), judge) > 1
    replay(sampled(history, 40, seed=seed), judge)


def test_owners_are_named(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    data = bytearray(path.read_bytes())
    # L2 table and data in one place: the L1 table names the refcount block.
    data[3 << 16 : (3 << 16) + 8] = ((2 << 16) | 1 << 63).to_bytes(8, "big")
    path.write_bytes(data)
    result = check(path)
    found = rescue.explain(str(path), result.findings)
    assert "refcount block 0" in found[2] and "L2 table 0 of the disk" in found[2]

"""Writing behind: a hint that changes nothing of what is copied, given only where a flush follows, and dropped where it does not work."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import cowhand
from cowhand.copy.engine import write_out
from cowhand.core import syscalls
from cowhand.image.create import create
from cowhand.jobs.commit import commit

SIZE = 8 << 20


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Have small copies give hints as well, and return them: (offset, length)."""
    seen: list[tuple[int, int]] = []
    begin = syscalls.start_writing_out

    def noticed(descriptor: int, offset: int, length: int) -> None:
        seen.append((offset, length))
        begin(descriptor, offset, length)

    monkeypatch.setattr(write_out, "MIN_TOTAL", 0)
    monkeypatch.setattr(syscalls, "start_writing_out", noticed)
    return seen


def overlay(folder: Path) -> tuple[Path, bytes]:
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    create(base, "qcow2", SIZE)
    create(top, "qcow2", SIZE, backing=str(base), backing_format="qcow2")
    data = bytes(range(256)) * 4096 * 5
    with cowhand.open(top, writable=True) as disk:
        disk.write(1 << 20, data)
    return top, data


@pytest.mark.skipif(not syscalls.LINUX, reason="a call of Linux")
@pytest.mark.parametrize(("cache", "given"), [("writeback", True), ("unsafe", False)])
def test_a_commit_that_is_flushed_writes_behind(
    cache: str, given: bool, tmp_path: Path, hints: list[tuple[int, int]]
) -> None:
    top, data = overlay(tmp_path)
    commit(top, cache=cache)
    with cowhand.open(tmp_path / "base.qcow2") as disk:
        assert disk.read(1 << 20, len(data)) == data
    assert sum(length for _, length in hints) == (len(data) if given else 0)


def test_without_the_call_everything_is_copied_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refused(descriptor: int, offset: int, length: int) -> None:
        calls.append(offset)
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(write_out, "MIN_TOTAL", 0)
    monkeypatch.setattr(syscalls, "start_writing_out", refused)
    top, data = overlay(tmp_path)
    commit(top)
    with cowhand.open(tmp_path / "base.qcow2") as disk:
        assert disk.read(1 << 20, len(data)) == data
    assert 1 <= len(calls) <= 2, "each worker may have tried once"

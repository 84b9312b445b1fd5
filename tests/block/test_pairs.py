"""Two things at once: both end, the first one's error is raised, and a helper is used again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from cowhand.core import pairs
from tests.tools.patience import PATIENCE


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_several", True)


def test_both_run_and_the_second_in_another_thread() -> None:
    where: list[int] = []
    meeting = threading.Barrier(2)

    def work() -> None:
        meeting.wait(PATIENCE)
        where.append(threading.get_ident())

    for _ in range(3):
        pairs.both(work, work)
    assert len(where) == 6
    assert len(set(where)) == 2


@pytest.mark.parametrize(("failing", "raised"), [("first", "first"), ("second", "second"), ("both", "first")])
def test_an_error_is_raised_when_both_have_ended(failing: str, raised: str) -> None:
    ended: list[str] = []

    def job(name: str) -> None:
        ended.append(name)
        if failing in (name, "both"):
            raise ValueError(name)

    with pytest.raises(ValueError, match=raised) as caught:
        pairs.both(lambda: job("first"), lambda: job("second"))
    assert getattr(caught.value, "__notes__", []) == (
        ["beside it failed: ValueError: second"] if failing == "both" else []
    )
    assert sorted(ended) == ["first", "second"]
    pairs.both(lambda: ended.append("third"), lambda: ended.append("fourth"))
    assert sorted(ended[2:]) == ["fourth", "third"]


def test_a_helper_ends_by_itself_after_an_interrupt() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    for first, second in ((interrupted, interrupted), (lambda: None, interrupted)):
        with pytest.raises(KeyboardInterrupt):
            pairs.both(first, second)
    # That no thread stays behind is seen to after every test.
    assert len(pairs._idle) <= 1


def test_without_a_second_processor_one_comes_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_several", False)
    monkeypatch.setattr(pairs, "_idle", [])
    threads: list[int] = []
    pairs.both(lambda: threads.append(threading.get_ident()), lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork(2) here")
def test_a_child_makes_its_own_helper() -> None:
    pairs.both(lambda: None, lambda: None)
    pid = os.fork()
    if pid == 0:
        done: list[int] = []
        pairs.both(lambda: done.append(1), lambda: done.append(2))
        os._exit(0 if sorted(done) == [1, 2] else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_an_interrupt_just_when_the_second_has_ended_is_no_reason_to_wait_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = pairs._Helper.start
    asked: list[str] = []

    class Interrupting:
        def __init__(self, lock: threading.Lock) -> None:
            self.lock = lock

        def release(self) -> None:
            self.lock.release()

        def acquire(self) -> None:
            asked.append("once more")
            if len(asked) == 1:
                self.lock.acquire()
                raise KeyboardInterrupt

    def started(helper: pairs._Helper, job: Callable[[], None]) -> None:
        start(helper, job)
        helper._end = Interrupting(helper._end)  # type: ignore[assignment]

    monkeypatch.setattr(pairs._Helper, "start", started)
    with pytest.raises(KeyboardInterrupt):
        pairs.both(lambda: None, lambda: time.sleep(0.05))
    assert len(asked) == 1, "it would have waited for ever"
    monkeypatch.undo()
    monkeypatch.setattr(pairs, "_several", True)
    ended: list[int] = []
    pairs.both(lambda: ended.append(1), lambda: ended.append(2))
    assert sorted(ended) == [1, 2]

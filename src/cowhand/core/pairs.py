"""Two things at once: a second thread, kept waiting between uses, for work whose time goes into system calls.

Handing over costs some 50 µs, so this is for parts of a millisecond and more. Threads are made when they are needed, end when they have had
nothing to do for a while, and belong to nobody in between; a forked child makes its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

#: Seconds without work after which a thread ends.
IDLE_SECONDS = 0.5


class _Helper:
    """A thread that does one job after another."""

    def __init__(self) -> None:
        self._begin = threading.Lock()
        self._begin.acquire()
        self._end = threading.Lock()  #: another one for each job
        self._done = False
        self._job: Callable[[], None] | None = None
        self._failure: BaseException | None = None
        threading.Thread(target=self._work, name="cowhand helper", daemon=True).start()

    def _work(self) -> None:
        while True:
            while not self._begin.acquire(timeout=IDLE_SECONDS):
                try:
                    _idle.remove(self)
                except ValueError:
                    continue  # somebody has just taken it, and is about to start it
                return
            job, self._job = self._job, None
            end = self._end
            assert job is not None
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised by finish() in the caller's thread
                self._failure = error
            del job
            self._done = True
            end.release()

    def start(self, job: Callable[[], None]) -> None:
        self._job = job
        self._done = False
        self._end = threading.Lock()
        self._end.acquire()
        self._begin.release()

    def finish(self) -> None:
        """Wait for the job's end; raises what it raised."""
        interrupt: BaseException | None = None
        # An interrupt may also come when the lock has just been taken: it is the flag that counts.
        while not self._done:
            try:
                self._end.acquire()
            except BaseException as error:  # noqa: BLE001 - the job's buffers are in use until it has ended
                interrupt = error
        failure, self._failure = self._failure, None
        if interrupt is not None:
            raise interrupt
        if failure is not None:
            raise failure


_idle: list[_Helper] = []
_several = len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) > 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


def _helper() -> _Helper | None:
    try:
        return _idle.pop()
    except IndexError:
        try:
            return _Helper() if _several else None
        except RuntimeError:
            return None  # the system gives no more threads


def both(first: Callable[[], None], second: Callable[[], None]) -> None:
    """Call *first* in this thread and *second* in another; return when both have ended. Without a free thread, one after the other.

    Raises what *first* raised, or else what *second* raised. Thread-safe.
    """
    helper = _helper()
    if helper is None:
        try:
            first()
        finally:
            second()
        return
    helper.start(second)
    failure: BaseException | None = None
    try:
        first()
    except BaseException as error:  # noqa: BLE001 - raised below, when the other one has ended
        failure = error
    try:
        helper.finish()
    except Exception as error:
        if failure is None:
            raise
        failure.add_note(f"beside it failed: {type(error).__name__}: {error}")
    finally:
        _idle.append(helper)  # its job has ended, whatever was raised
    if failure is not None:
        raise failure

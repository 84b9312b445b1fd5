"""What one step may use up: processor time, and memory. Wall-clock time says nothing on a machine that others use as well."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Of processor time, for each step: issue and documents promise an answer within this.
STEP_SECONDS = 2.0
#: By which the process's peak may grow in one step.
STEP_BYTES = 256 << 20
#: How many times as long instrumented code may take before it is stopped: two to four times as long, measured, is common.
INSTRUMENTED = 3.0

_factor = 1.0


def set_factor(factor: float) -> None:
    """Multiply the time of all steps from now on."""
    global _factor
    _factor = factor


class Exceeded(BaseException):
    """A step used up its budget. No Exception: what the step catches must not swallow it."""


class TooSlow(Exceeded):
    """It was the time."""


@contextmanager
def budget(name: str, seconds: float | None = None, memory: int = STEP_BYTES) -> Iterator[None]:
    """Raise Exceeded in the middle of the block when its time is over, or at its end where it took more memory.

    In another thread than the main one, which alone gets signals, both are judged at the end.
    """
    seconds = STEP_SECONDS * _factor if seconds is None else seconds
    begin, peak = time.process_time(), _peak()
    alarm = threading.current_thread() is threading.main_thread()

    def over(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow(f"{name}: more than {seconds} s of processor time")

    if alarm:
        before = signal.signal(signal.SIGPROF, over)
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
    spent, grown = time.process_time() - begin, _peak() - peak
    if spent > seconds:
        raise TooSlow(f"{name}: {spent:.1f} s of processor time, more than {seconds}")
    if grown > memory:
        raise Exceeded(f"{name}: the process grew by {grown >> 20} MiB, more than {memory >> 20}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

"""Sound images during whose treatment something happens that must never happen: they show that the watch sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from cowhand.core.errors import InvalidFormat
from tests.hostile.cases import Subject, build, maker
from tests.hostile.worker import CPU_SECONDS, MEMORY_BYTES


def _raise() -> None:
    raise KeyError("a traceback")


def _say_nothing() -> None:
    raise InvalidFormat("")


def _take_long() -> None:
    end = time.process_time() + CPU_SECONDS + 1
    while time.process_time() < end:
        pass


def _take_long_and_hide_it() -> None:
    try:
        _take_long()
    except BaseException:  # noqa: BLE001 - what a careless handler would do
        return


def _take_memory() -> None:
    blocks = [bytearray(16 << 20) for _ in range(MEMORY_BYTES // (16 << 20) + 2)]
    assert blocks


def _open_another() -> None:
    Path("/etc/passwd").read_bytes()


def _end() -> None:
    os.abort()


FAULTS: dict[str, Callable[[], None]] = {
    "KeyError": _raise, "an error that says nothing": _say_nothing, "TooSlow": _take_long, "swallowed": _take_long_and_hide_it,
    "MemoryError": _take_memory, "/etc/passwd": _open_another, "Fatal Python error: Aborted": _end,
}  # fmt: skip


@maker("fault")
def _fault(rest: str, folder: Path) -> Subject:
    subject = build("sound/9", folder)
    subject.also = FAULTS[rest]
    return subject

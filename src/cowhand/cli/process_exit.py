"""Ending a tool's process without taking the interpreter apart, which costs a small command a quarter of its time."""

from __future__ import annotations

import atexit
import os
import sys


def leave(status: int) -> int:
    """End the process with *status* when nothing is left to be done; otherwise return *status*, for ``sys.exit``.

    What may be left: output that cannot be written (the interpreter says so), functions that were registered to run at the end, threads.
    Images are closed by those who opened them.
    """
    threading = sys.modules.get("threading")
    registered = getattr(atexit, "_ncallbacks", None)
    unclosed = sys.modules.get("cowhand.plans.unclosed")
    idle = 0 if unclosed is None else unclosed.idle_callbacks()
    if registered is None or registered() > idle or (threading is not None and threading.active_count() > 1):
        return status
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return status
    os._exit(status)

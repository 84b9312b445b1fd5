"""Running a command: its work is done in a thread, so that signals are answered whatever the command waits for.

The main thread does no I/O on images. The first Ctrl-C (or SIGTERM, SIGHUP) sets the command's cancel token: it ends at its next safe point.
The second one leaves at once; images are then as after a crash, which may cost space but no data.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

from cowhand.cli.output import Output
from cowhand.core.errors import CowhandError, from_os_error
from cowhand.core.progress import CancelToken, Progress

EXIT_INTERNAL = 70  #: sysexits.h: an error inside of the program
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
#: A command that only reads has so many seconds to end by itself after it was interrupted.
GRACE_SECONDS = 2.0


class Context:
    """What a command is given beside its arguments: where to write, and how it is told to stop."""

    def __init__(self, name: str, args: Namespace) -> None:
        self.name = name
        self.out = Output(
            json=getattr(args, "output", "text") == "json",
            quiet=getattr(args, "quiet", False),
            progress=getattr(args, "progress", False),
        )
        self.cancel = CancelToken()
        self._listeners: list[Any] = []

    def progress(self, label: str, total: int = 0) -> Progress:
        """Return the progress of an operation on *total* bytes; it is shown where somebody sees it."""
        if not self.out.shows_progress:
            return Progress(total)
        from cowhand.cli.progress import listener

        shown = listener(label, self.out)
        self._listeners.append(shown)
        return Progress(total, shown)

    def close(self) -> None:
        """Take progress bars away."""
        for shown in self._listeners:
            shown.close()


def run(command: ModuleType, name: str, args: Namespace) -> int:
    """Run *command* with *args* to its end, or to where a signal stopped it; return the exit code."""
    context = Context(name, args)
    mailbox: queue.SimpleQueue[int] = queue.SimpleQueue()
    outcome: list[int | BaseException] = []

    def work() -> None:
        try:
            outcome.append(command.run(args, context))
        except BaseException as error:  # noqa: BLE001 - it is raised again, or told, by the thread that waits
            outcome.append(error)
        finally:
            context.close()
            mailbox.put(0)

    restore = _catch_signals(mailbox)
    worker = threading.Thread(target=work, name="command")
    try:
        worker.start()
        number = _wait(mailbox, context, patient=command.WRITES)
        worker.join()
    finally:
        restore()
    result = outcome[0]
    if isinstance(result, int):
        context.out.flush()
        return result
    if isinstance(result, SystemExit):
        raise result
    return report(result, context, number)


def _catch_signals(mailbox: queue.SimpleQueue[int]) -> Callable[[], None]:
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handler(number: int, frame: FrameType | None) -> None:
        # SimpleQueue.put may be called from a handler that interrupts get; the other queues and events may not.
        mailbox.put(number)

    before = {number: signal.signal(number, handler) for number in _SIGNALS}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    return restore


def _wait(mailbox: queue.SimpleQueue[int], context: Context, *, patient: bool) -> int:
    """Wait for the worker's end; return the number of the signal that came, or 0."""
    interrupted = 0
    while True:
        try:
            number = mailbox.get(timeout=GRACE_SECONDS if interrupted and not patient else None)
        except queue.Empty:
            _leave(interrupted)
        if not number:
            return interrupted
        if interrupted:
            _leave(number)
        interrupted = number
        context.cancel.cancel("interrupted")
        if patient:
            context.out.note("stopping at the next safe point; once more leaves at once")


def _leave(number: int) -> None:
    """End the process without waiting for anything."""
    sys.stderr.write("\n")
    sys.stderr.flush()
    os._exit(128 + number)


def report(error: BaseException, context: Context, number: int = 0) -> int:
    """Tell *error* to the user and return the exit code that it stands for; *number* is the signal that came before it."""
    if isinstance(error, BrokenPipeError):
        raise error
    context.out.flush()
    if isinstance(error, CowhandError):
        known: CowhandError = error
    elif isinstance(error, OSError):
        known = from_os_error(error, error.filename if isinstance(error.filename, str) else None)
    elif isinstance(error, MemoryError):
        known = CowhandError("there is not enough memory")
    else:
        return _internal(error, context)
    context.out.error(context.name, known)
    return 128 + number if number and known.code == "cancelled" else known.exit_code


def _internal(error: BaseException, context: Context) -> int:
    import traceback

    traceback.print_exception(error)
    known = CowhandError(
        f"internal error: {type(error).__name__}: {error}",
        hint="This is a mistake in cowhand: please report it with the lines above. Images that were being written are as after a crash.",
    )
    known.exit_code = EXIT_INTERNAL
    context.out.error(context.name, known)
    return EXIT_INTERNAL

"""Running a command: its work is done in a thread, so that signals are answered whatever the command waits for.

The main thread does no I/O on images. The first Ctrl-C (or SIGTERM, SIGHUP) sets the command's cancel token: it ends at its next safe point.
The second one leaves at once; images are then as after a crash, which may cost space but no data.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from argparse import Namespace
from types import FrameType, ModuleType
from typing import Any, NoReturn

from cowhand.block.locking import device_use
from cowhand.cli.output import Output
from cowhand.core.errors import CowhandError, from_os_error
from cowhand.core.progress import CancelToken, Progress

#: Options that ask for passphrases.
_OF_SECRETS = ("secret", "key_file", "encrypt", "target_secret", "target_key_file")
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
    if not getattr(args, "no_locks", False):
        return _with_secrets(command, name, args)
    from cowhand.block.locking.image_lock import missing_locks_allowed

    with missing_locks_allowed():
        return _with_secrets(command, name, args)


def _with_secrets(command: ModuleType, name: str, args: Namespace) -> int:
    if hasattr(command, "ask"):
        command.ask(args)
    if not any(getattr(args, option, None) for option in _OF_SECRETS):
        return _run(command, name, args)
    from cowhand.cli.secrets import offered

    # Here, in the main thread: Ctrl-C ends the question.
    try:
        with offered(args):
            return _run(command, name, args)
    except (CowhandError, KeyboardInterrupt) as error:
        if isinstance(error, CowhandError):
            return report(error, Context(name, args))
        sys.stderr.write("\n")
        return 128 + signal.SIGINT


def _run(command: ModuleType, name: str, args: Namespace) -> int:
    context = Context(name, args)
    mailbox = Mailbox()
    outcome: list[int | BaseException] = []

    def work() -> None:
        try:
            with device_use.refused(not getattr(args, "force", False)):
                outcome.append(command.run(args, context))
        except BaseException as error:  # noqa: BLE001 - it is raised again, or told, by the thread that waits
            outcome.append(error)
        finally:
            context.close()
            mailbox.put(0)

    worker = threading.Thread(target=work, name="command")
    with mailbox:
        worker.start()
        number = _wait(mailbox, context, patient=command.writes(args) if hasattr(command, "writes") else command.WRITES)
        worker.join()
    result = outcome[0]
    if isinstance(result, int):
        context.out.flush()
        return result
    if isinstance(result, SystemExit):
        raise result
    return report(result, context, number)


class Mailbox:
    """A pipe into which signals and the worker's end fall, one byte each; a context manager that catches signals inside.

    The interpreter's own C handler writes the byte (``signal.set_wakeup_fd``). Waiting on a lock or a queue instead would lose a signal
    that comes between the last look at pending signals and the wait.
    """

    def __enter__(self) -> Mailbox:
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, _noticed) for number in _SIGNALS}
            self._wakeup = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            for number, old in self._before.items():
                signal.signal(number, old)
        os.close(self._in)
        os.close(self._out)

    def put(self, number: int) -> None:
        """Drop *number* (0: the worker has ended)."""
        os.write(self._in, bytes([number]))

    def get(self, timeout: float | None) -> int | None:
        """Wait for the next number that is 0 or one of the signals; None when *timeout* seconds have passed."""
        while True:
            if not select.select([self._out], [], [], timeout)[0]:
                return None
            number = os.read(self._out, 1)[0]
            if not number or number in _SIGNALS:
                return number


def _noticed(number: int, frame: FrameType | None) -> None:
    """Be there, so that the signal neither ends the process nor is ignored."""


def _wait(mailbox: Mailbox, context: Context, *, patient: bool) -> int:
    """Wait for the worker's end; return the number of the signal that came, or 0."""
    interrupted = 0
    while True:
        number = mailbox.get(GRACE_SECONDS if interrupted and not patient else None)
        if number is None:
            _leave(interrupted)
        if not number:
            return interrupted
        if interrupted:
            _leave(number)
        interrupted = number
        context.cancel.cancel("interrupted")
        if patient:
            context.out.note("stopping at the next safe point; Ctrl-C again stops immediately")


def _leave(number: int) -> NoReturn:
    """End the process without waiting for anything."""
    new_file = sys.modules.get("cowhand.image.new_file")
    if new_file is not None:
        new_file.discard_all()
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
        hint="This is a bug in cowhand: please report it with the lines above. Images that were being written are as after a crash.",
    )
    known.exit_code = EXIT_INTERNAL
    context.out.error(context.name, known)
    return EXIT_INTERNAL

"""What many commands share: the common options, progress, and a pass of creation's errors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import Grammar, OptionError, options
from cowhand.cli.compat.img import show_help
from cowhand.cli.compat.img.longnames import LATER_LETTERS, LONG_NAMES
from cowhand.cli.compat.objects import Objects
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from types import FrameType

    from cowhand.core.progress import Progress


class Command:
    """The command line of one command: yields its own options, handles ``--help`` and ``--object``, then holds ``positional``."""

    def __init__(self, words: Sequence[str], short: str, long: Mapping[str, str] | None = None) -> None:
        self._words = words
        self._name = words[0]
        self._letters: Mapping[str, str] = {}
        if program.since("10.1"):
            self._letters = LATER_LETTERS.get(self._name, {})
            short += "".join(f"{letter}:" for letter in self._letters)
        self._long = {"help": "h", **(long or {}), "object": "object="}
        self._short = short
        self._grammar = Grammar(short, self._long, later=LONG_NAMES.get(self._name))
        self.positional: list[str] = []
        self.objects = Objects()

    def first_argument(self) -> int | None:
        """Return where in the words the first one stands that is no option and belongs to none; None where a wrong option comes before."""
        grammar = Grammar(self._short, self._long, permute=False, later=LONG_NAMES.get(self._name))
        scanner = grammar.scan(self._words)
        try:
            for _ in scanner:
                pass
        except OptionError:
            return None
        return scanner.index if scanner.index < len(self._words) else None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for key, value in options(self._grammar, self._words, self.positional):
            if key == "h":
                if program.since("10.0"):
                    from cowhand.cli.compat.img.help import text_of

                    print(text_of(self._name, self._grammar.short, self._long))
                else:
                    show_help()
                raise Failure(status=0)
            if key == "object":
                self.objects.add(value)
            else:
                yield self._letters.get(key, key), value


@contextmanager
def failing_as(prefix: str) -> Iterator[None]:
    """Turn errors inside into a Failure that begins with *prefix*."""
    try:
        yield
    except CowhandError as error:
        raise Failure(f"{prefix}{error.qemu()}") from error
    except Failure as failure:
        if failure.message is None:
            raise
        raise Failure(f"{prefix}{failure.message}", status=failure.status, hint=failure.hint) from None


class ProgressLine:
    """The line "    (12.50/100%)", printed over and over with ``-p``, and once for each SIGUSR1 without it."""

    def __init__(self, shown: bool, *, step: float = 1.0, at_once: bool = True) -> None:
        """*step*: percents that are not worth a new line; not *at_once*: the first line comes when it is asked for."""
        self._shown = shown
        self._step = step
        self._at_once = at_once
        self._last = -1.0
        self._asked = False
        self._handler: Any = None
        self._lock = threading.Lock()
        self._done = 0

    def __enter__(self) -> ProgressLine:
        if not self._shown:
            self._answer_signals()
        elif self._at_once:
            self.show(0.0)
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            print()
        elif self._handler is not None:
            import signal

            signal.signal(signal.SIGUSR1, self._handler)

    def _answer_signals(self) -> None:
        import signal

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked = True

        if hasattr(signal, "SIGUSR1"):
            self._handler = signal.signal(signal.SIGUSR1, ask)

    def progress(self) -> Progress:
        """Return what counts an operation's bytes."""
        from cowhand.core.progress import Progress

        line = self

        class Steps(Progress):
            """Shows each step with what was done by then, which a listener, called later, cannot know."""

            def advance(self, count: int) -> None:
                super().advance(count)
                with line._lock:
                    line._done += count
                    line.hear(line._done / self.total if self.total else 1.0)

            def finish(self) -> None:
                super().finish()
                with line._lock:
                    line.hear(1.0)

        return Steps()

    def hear(self, fraction: float) -> None:
        """Take news from an operation; called from its threads, one at a time."""
        percent = min(100.0, fraction * 100)
        if self._shown:
            self.show(percent)
        elif self._asked:
            self._asked = False
            sys.stderr.write(f"    ({percent:3.2f}/100%)\n")
            sys.stderr.flush()

    def show(self, percent: float) -> None:
        if not self._shown:
            return
        if percent - self._last > self._step or percent in (0.0, 100.0):
            self._last = percent
            sys.stdout.write(f"    ({percent:3.2f}/100%)\r")
            sys.stdout.flush()

    def show_part(self, done: int, whole: int) -> None:
        """Show that *done* of *whole* equal parts are done; quietly where no progress was asked for."""
        if self._shown:
            self.show(100 * done / whole)

"""What commands print: plain lines, or tables and colour on a terminal, or JSON.

``rich`` is imported only where standard output is a terminal: it costs as much as a whole ``cowhand info``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from cowhand.core.errors import CowhandError

#: Names in images may hold what steers terminals (and, in JSON, is escaped anyway).
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return *text* with control characters and undecodable bytes shown as ``\\xNN``, so that no name can steer a terminal."""
    return _CONTROL.sub(lambda match: f"\\x{_byte_of(match[0]):02x}", text)


def _byte_of(character: str) -> int:
    value = ord(character)
    return value - 0xDC00 if 0xDC80 <= value <= 0xDCFF else value


def is_terminal(stream: TextIO) -> bool:
    """Tell whether *stream* can show colour: a terminal that is not dumb, or any stream when FORCE_COLOR is set."""
    if os.environ.get("FORCE_COLOR"):
        return True
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


class Output:
    """Where a command writes. Results go to standard output; notes, warnings, progress and errors to standard error.

    Used by the command's thread; :meth:`note` also by the main one.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, progress: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.wants_progress = progress
        self.rich = not json and is_terminal(sys.stdout)
        self._stream = sys.stdout
        self._gathered: list[Any] | None = None

    @cached_property
    def console(self) -> Console:
        """The terminal; only where :attr:`rich` is set."""
        from rich.console import Console

        return Console(highlight=False, emoji=False, markup=False, force_terminal=True)

    @property
    def shows_progress(self) -> bool:
        """Whether somebody sees progress: asked for, or standard error is a terminal."""
        return not self.quiet and (self.wants_progress or is_terminal(sys.stderr))

    # -- results

    def give_way(self) -> None:
        """Send results to standard error from now on: standard output is where the data goes."""
        self._stream = sys.stderr
        self.rich = False

    def data(self, text: str) -> None:
        """Print one line that a program may read again, also when quiet: every byte of a name as it is, but on a terminal. Not with JSON."""
        if self.json:
            return
        if is_terminal(sys.stdout):
            self._write(printable(text) + "\n")
            return
        sys.stdout.flush()
        raw = getattr(sys.stdout, "buffer", None)
        if raw is None:
            self._write(text + "\n")
        else:
            raw.write(os.fsencode(text) + b"\n")
            raw.flush()

    def line(self, text: str = "") -> None:
        """Print one line of a result; nothing when quiet or when JSON was asked for."""
        if not self.json and not self.quiet:
            self._write(printable(text) + "\n")

    def fault(self, text: str) -> None:
        """Print one line of a result that says that something is wrong, also when quiet."""
        self._write(printable(text) + "\n")

    def document(self, value: Any) -> None:
        """Print *value* as the JSON document that was asked for."""
        if self._gathered is not None:
            self._gathered.append(value)
            return
        import json

        self._write(json.dumps(value, indent=2) + "\n")

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Print the documents of the block as one list, also where it is left by an error."""
        gathered: list[Any] = []
        self._gathered = gathered
        try:
            yield
        finally:
            self._gathered = None
            if self.json:
                self.document(gathered)

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values, aligned."""
        kept = [(name, printable(value)) for name, value in rows]
        width = max((len(name) for name, _ in kept), default=0) + 2
        if self.rich:
            from rich.text import Text

            for name, value in kept:
                self.console.print(Text.assemble((f"{name + ':':{width}}", "dim"), value), soft_wrap=True)
            return
        for name, value in kept:
            self.line(f"{name + ':':{width}}{value}".rstrip())

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Print a table; *right* holds the numbers of the columns that are aligned to the right."""
        cells = [[printable(cell) for cell in row] for row in rows]
        if self.rich:
            from rich.box import SIMPLE_HEAD
            from rich.table import Table
            from rich.text import Text

            table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
            for index, title in enumerate(titles):
                table.add_column(title, justify="right" if index in right else "left", overflow="fold")
            for row in cells:
                table.add_row(*(Text(cell) for cell in row))
            self.console.print(table)
            return
        widths = [max(len(row[index]) for row in [list(titles), *cells]) for index in range(len(titles))]
        for row in [list(titles), *cells]:
            padded = (
                cell.rjust(width) if index in right else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            self.line("  ".join(padded).rstrip())

    # -- what is said beside the result

    def note(self, text: str) -> None:
        """Say something on standard error; nothing when quiet."""
        if not self.quiet:
            self._say(f"cowhand: {printable(text)}\n", "2")

    def warn(self, text: str) -> None:
        """Warn on standard error, also when quiet."""
        self._say(f"cowhand: warning: {printable(text)}\n", "33")

    def error(self, command: str, error: CowhandError) -> None:
        """Tell *error*: what happened, where, what to do next. One line of JSON where JSON was asked for."""
        if self.json:
            import json

            facts = {
                "code": error.code,
                "message": error.message,
                "path": error.path,
                "offset": error.offset,
                "hint": error.hint,
                "exit-code": error.exit_code,
                "within": [frame for frame, _ in error.frames if frame],
            }
            sys.stderr.write(json.dumps({"error": facts}) + "\n")
            return
        # A name may hold line breaks: they are no lines of the message.
        hint = f"\n  {error.hint}" if error.hint else ""
        self._say(f"cowhand {command}: {printable(str(error).removesuffix(hint))}\n", "1;31")
        for line in hint[1:].split("\n") if hint else ():
            sys.stderr.write(printable(line) + "\n")
        sys.stderr.flush()

    def flush(self) -> None:
        """Hand on what was printed."""
        sys.stdout.flush()
        sys.stderr.flush()

    def _write(self, text: str) -> None:
        self._stream.write(text)

    def _say(self, text: str, style: str) -> None:
        if is_terminal(sys.stderr) and not os.environ.get("NO_COLOR"):
            text = f"\x1b[{style}m{text[:-1]}\x1b[0m\n"
        sys.stderr.write(text)
        sys.stderr.flush()

"""Progress for people: a bar with rate and time left on a terminal, a line for every tenth elsewhere (with ``--progress``)."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from cowhand.cli.output import Output, is_terminal, printable
from cowhand.core.progress import Progress
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress, TaskID

#: Operations that end sooner show no bar.
_QUIET_SECONDS = 0.3


def listener(label: str, out: Output) -> Bar | Lines:
    """Return what shows the progress of *label*."""
    shown = printable(label)
    return Bar(shown) if is_terminal(sys.stderr) else Lines(shown)


def duration(seconds: float) -> str:
    """Return a time for people: "8 s", "3:05 min", "2:10 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def status(progress: Progress) -> str:
    """Return amount, rate and time left in words."""
    parts = [f"{format_size(progress.done)} of {format_size(progress.total)}", f"{format_size(int(progress.rate))}/s"]
    if progress.ended is not None:
        parts.append(f"in {duration(progress.elapsed)}")
    elif progress.remaining is not None:
        parts.append(f"{duration(progress.remaining)} left")
    return ", ".join(parts)


class Bar:
    """A bar on standard error, drawn by ``rich``; it appears when the operation takes more than a moment, and leaves no trace."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._live: RichProgress | None = None
        self._task: TaskID | None = None
        self._closed = False
        # Workers bring news while the command ends: what is closed stays closed.
        self._lock = threading.RLock()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        if self._closed or (self._live is None and progress.elapsed < _QUIET_SECONDS):
            return
        if self._live is None:
            self._start()
        assert self._live is not None
        assert self._task is not None
        self._live.update(self._task, completed=progress.done, total=progress.total or None, status=status(progress))
        if progress.ended is not None:
            self.close()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress as RichProgress, TaskProgressColumn, TextColumn

        console = Console(stderr=True, highlight=False, emoji=False, markup=False)
        self._live = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            transient=True,
            expand=True,
        )
        self._task = self._live.add_task(self._label, total=None, status="")
        self._live.start()

    def close(self) -> None:
        """Take the bar away."""
        with self._lock:
            self._closed = True
            if self._live is not None:
                self._live.stop()
                self._live = None


class Lines:
    """A line on standard error for every tenth of the work, and one at its end."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._told = 0

    def __call__(self, progress: Progress) -> None:
        tenth = int(progress.fraction * 10)
        if tenth <= self._told and progress.ended is None:
            return
        self._told = tenth
        sys.stderr.write(f"{self._label}: {progress.fraction:.0%}, {status(progress)}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Nothing has to be taken away."""

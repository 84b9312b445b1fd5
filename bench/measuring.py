"""Measuring pairs: ours and the peer's in one run, in alternating order, and the median of the ratios.

Machines are shared and their speed wanders, so single figures mean little; what two programs needed right after one another can be compared.
Processes are started by posix_spawn and awaited by wait4: no shell, no time limit (which would round to its polling), and CPU time comes along.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep

#: What measured programs see: no setting of Python's, so that bytecode is kept and found as for any user.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


class ProgramFailed(Exception):
    """A measured program ended with an error; nothing can be said about its speed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: seconds on the clock and of processors, the size of what was made and the MiB of memory where these matter."""

    wall: float
    cpu: float
    size: int = 0
    peak: float = 0


@dataclass(slots=True)
class Case:
    """One row: what both sides do. ``prepare`` runs before each side, unmeasured (rotating files, removing old results).

    *goal* None: the row only says how near a goal can be come.
    """

    name: str
    peer_name: str
    goal: float | None
    ours: Callable[[], Sample]
    peer: Callable[[], Sample]
    prepare: Callable[[], None] = lambda: None
    size_goal: float | None = None
    rounds: int | None = None


@dataclass(slots=True)
class Row:
    """What was measured of a case."""

    name: str
    peer_name: str
    goal: float | None
    ours: list[Sample] = field(default_factory=list)
    peer: list[Sample] = field(default_factory=list)
    size_goal: float | None = None
    unit: str = "ratio"

    @property
    def ratio(self) -> float:
        """Median of the pairs' ratios; for a row without a peer the median of CPU seconds, or of memory."""
        if not self.peer and self.unit == "MiB":
            return statistics.median(sample.peak for sample in self.ours)
        if not self.peer:
            return statistics.median(sample.cpu for sample in self.ours)
        return statistics.median(one.wall / other.wall for one, other in zip(self.ours, self.peer, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles of the ratios."""
        values = sorted(one.wall / other.wall for one, other in zip(self.ours, self.peer, strict=True))
        if len(values) < 2:
            return (self.ratio, self.ratio)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high

    @property
    def size_ratio(self) -> float | None:
        """Our result's size to the peer's, where sizes were noted."""
        if not self.peer or not self.peer[-1].size:
            return None
        return self.ours[-1].size / self.peer[-1].size

    @property
    def reached(self) -> bool:
        """Whether the goal, and that for the size, is reached."""
        size = self.size_ratio
        if self.goal is None:
            return True
        return self.ratio <= self.goal and (self.size_goal is None or size is None or size <= self.size_goal)


def spawn(*argv: str | os.PathLike[str], output: Path | None = None) -> Sample:
    """Run a program to its end; its output goes to *output* or nowhere. Raises ProgramFailed."""
    words = [os.fspath(word) for word in argv]
    target = os.fspath(output) if output is not None else os.devnull
    actions = [
        (os.POSIX_SPAWN_OPEN, 1, target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
    ]
    begin = perf_counter()
    pid = os.posix_spawn(words[0], words, ENVIRONMENT, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    wall = perf_counter() - begin
    if os.waitstatus_to_exitcode(status) != 0:
        raise ProgramFailed(f"{' '.join(words)}: exit status {os.waitstatus_to_exitcode(status)}")
    return Sample(wall, usage.ru_utime + usage.ru_stime)


def spawn_for_memory(*argv: str | os.PathLike[str]) -> Sample:
    """Run a program to its end, and look at its memory meanwhile: what wait4 tells of that includes our own at the spawn."""
    words = [os.fspath(word) for word in argv]
    actions = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0o644)]
    begin = perf_counter()
    pid = os.posix_spawn(words[0], words, ENVIRONMENT, file_actions=actions)
    peak = 0
    while True:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    peak = int(line.split()[1])
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        sleep(0.002)
    if os.waitstatus_to_exitcode(status) != 0:
        raise ProgramFailed(f"{' '.join(words)}: exit status {os.waitstatus_to_exitcode(status)}")
    return Sample(perf_counter() - begin, usage.ru_utime + usage.ru_stime, peak=peak / 1024)


def measure(case: Case, rounds: int, tell: Callable[[str], None]) -> Row:
    """Run *case* so many times, ours first in one round and the peer's in the next, after one round that does not count."""
    row = Row(case.name, case.peer_name, case.goal, size_goal=case.size_goal)
    for number in range((case.rounds or rounds) + 1):
        pair: dict[str, Sample] = {}
        sides = [("ours", case.ours), ("peer", case.peer)]
        for name, side in sides if number % 2 else reversed(sides):
            case.prepare()
            pair[name] = side()
        if number:  # the first one warms the caches and compiles
            row.ours.append(pair["ours"])
            row.peer.append(pair["peer"])
    goal = f" (goal {row.goal:g})" if row.goal is not None else ""
    tell(f"{row.name}: {row.ratio:.2f} of {row.peer_name}{goal}")
    return row


def program(name: str) -> str:
    """Return the path of a program; raises SystemExit with its name when it is absent. No version manager's stand-ins."""
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return str(beside)
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = Path(folder, name)
        if os.access(path, os.X_OK) and ".pyenv/shims" not in path.as_posix():
            return str(path)
    raise SystemExit(f"bench needs {name}")

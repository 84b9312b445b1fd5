"""The process in which hostile images are treated: ``python -m tests.hostile.worker FOLDER`` reads names of cases, one a line, from its input.

For each it answers one line of JSON: what the image answered, what went wrong if anything did, and what it cost. Its address space is limited,
each step has a limit of processor time, and every file that is opened on the way is looked at.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cowhand.block.protocols.memory import MemoryNode
from cowhand.core import diagnostics
from cowhand.testing.recorder import RecorderNode
from tests.hostile import cases, treatment, verbs
from tests.hostile.treatment import Finding, Outcome

#: Ten times what any step takes: a machine with other work to do is slower.
CPU_SECONDS = 20.0
MEMORY_BYTES = 256 << 20

#: Where modules that are imported on demand come from.
_code = {
    os.path.realpath(path)
    for path in (*sys.path, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
}


class TooSlow(BaseException):
    """The step has used up its processor time."""


class Watch:
    """Sees which files are opened while it is on, and how long it takes."""

    def __init__(self) -> None:
        self.on = False
        self.opened: list[str] = []
        self.slow = False
        self.longest = 0.0  #: seconds of processor time
        self._begun = 0.0
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._late)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            self.opened.append(os.path.realpath(os.fsdecode(arguments[0])))
        elif event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec"):
            self.opened.append(f"{event} {arguments[1:]}")

    def _late(self, number: int, frame: FrameType | None) -> None:
        self.slow = True
        raise TooSlow

    def begin_step(self) -> None:
        """Give the next step its whole time, and note what the last one took."""
        now = time.process_time()
        self.longest = max(self.longest, now - self._begun)
        self._begun = now
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Watch the ``with`` block."""
        self.opened.clear()
        self.slow = False
        self._begun = time.process_time()
        self.on = True
        try:
            yield
        finally:
            self.begin_step()
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.on = False

    def foreign(self, allowed: list[Path]) -> list[str]:
        """Return what was opened besides *allowed* and the interpreter's own code."""
        names = {os.path.realpath(path) for path in allowed} | _code
        return [
            path for path in self.opened
            if path not in names and not path.startswith((*(f"{name}/" for name in names), "/proc/self/", f"/proc/{os.getpid()}/"))
        ]  # fmt: skip


def _preload() -> None:
    """Import what is otherwise imported on demand, so that it counts neither as time nor as memory of an image."""
    for module in (
        "backports.zstd",
        "isal.igzip_lib",
        "numpy",
        "cowhand.block.formats.luks",
        "cowhand.crypto.volume",
        "cryptography.hazmat.primitives.ciphers",
    ):
        importlib.import_module(module)
    subject = cases.build("sound/9", Path(sys.argv[1]))
    treat(subject, Watch())


def treat(subject: cases.Subject, watch: Watch) -> Outcome:
    """Put *subject* through everything. Raises what it must not raise."""
    outcome = Outcome(watch.begin_step)
    watch.longest = 0.0
    phases: list[tuple[list[Path] | None, Callable[[], None]]] = [
        ([subject.path], lambda: treatment.look_untrusted(subject.path, outcome)),
        ([subject.path.parent], lambda: treatment.look(subject.path, outcome)),
        ([subject.path], lambda: treatment.check(subject.path, outcome)),
    ]
    also = subject.also
    if also is not None:
        phases.append(([subject.path], lambda: outcome.attempt("also", also)))
    if subject.verbs:
        lines = verbs.LOOKING + (verbs.CHANGING if subject.writes else ())
        begin = watch.begin_step
        # What tools open on their way, looking for images that stand on this one, is not watched here.
        phases.insert(0, (None, lambda: verbs.every(subject.path, lines, begin)))
    if subject.writes:
        medium = None if subject.large else RecorderNode(MemoryNode(content=subject.path.read_bytes()))
        phases.append(
            (
                [subject.path] if subject.large else [],
                lambda: treatment.change(subject.path, medium, subject.base, outcome),
            )
        )
    if subject.repairs:
        phases.append(([subject.path], lambda: treatment.repair(subject.path, outcome)))
    for allowed, phase in phases:
        with watch.phase():
            phase()
        if watch.slow:
            raise Finding("the limit of processor time was passed, and the signal was swallowed")
        foreign = watch.foreign(allowed) if allowed is not None else []
        if foreign:
            raise Finding(f"opened {foreign}, which the user did not name")
    return outcome


def _answer(name: str, folder: Path, watch: Watch) -> dict[str, Any]:
    answer: dict[str, Any] = {"name": name, "failure": None}
    gc.collect()  # what the last image left behind is not this one's
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subject = cases.build(name, folder)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    try:
        outcome = treat(subject, watch)
        answer["cpu"] = watch.longest
    except (Exception, TooSlow):  # noqa: BLE001 - whatever it is, it is the answer
        answer["failure"] = traceback.format_exc()
    else:
        answer["steps"] = outcome.steps
        missing = [step for step in subject.refused if outcome.steps.get(step, "ok") == "ok"]
        if missing:
            answer["failure"] = f"{missing} should have been refused: {outcome.steps}"
        unwanted = [step for step in subject.accepted if outcome.steps.get(step) != "ok"]
        if unwanted:
            answer["failure"] = f"{unwanted} should have been accepted: {outcome.steps}"
    answer["memory"] = _status("VmHWM") - before
    if answer["memory"] > MEMORY_BYTES:
        answer["failure"] = f"{answer['memory'] >> 20} MiB of memory"
    return answer


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise LookupError(name)


def main() -> None:
    faulthandler.enable()
    diagnostics.set_sink(lambda message, as_tool: None)
    _preload()
    watch = Watch()
    limit = _status("VmSize") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        answer = _answer(line.rstrip("\n"), Path(sys.argv[1]) / "case", watch)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

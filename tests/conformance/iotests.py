"""Run QEMU's iotests one by one: each in its own folder, under a time limit, with nothing of it left running afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tests.conformance.toolset import USES_VARIABLE, Toolset

Status = Literal["pass", "fail", "not run", "timeout"]

#: A line of check's report: name, status, start, end, seconds, description.
_RESULT = re.compile(
    r"(?P<test>\S+)\s+(?P<status>pass|fail|not run)\s+\[[\d:]+\]\s+\[[\d:]+\]\s*(?:[\d.]+s|\.\.\.)?(?P<text>.*)"
)
_LAST_TIME = re.compile(r"\(last: [\d.]+s\)")
#: What QEMU's processes say when they could not measure their own speed (crypto/pbkdf.c): nothing about the tools under test.
_TOO_BUSY = ("Unable to get accurate CPU usage",)
_ATTEMPTS = 4
_DIFFERENCE = re.compile(r"[-+](?![-+]{2} )(.*)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test. ``detail`` is check's reason, or the first differing line; ``uses`` names the tools it called."""

    test: str
    status: Status
    seconds: float
    detail: str = ""
    uses: tuple[str, ...] = field(default=())
    date: str = ""
    #: What identifies the tools that were run: a version, or a hash of sources.
    tools: str = ""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Outcome:
        """Return the outcome that ``dataclasses.asdict`` made *value* from."""
        if value["status"] not in get_args(Status):
            raise ValueError(f"unknown status {value['status']!r}")
        return cls(**{**value, "uses": tuple(value["uses"])})


def names(folder: Path) -> list[str]:
    """Return the names of all tests below the iotests folder, numbered ones first."""
    numbered = [path.name for path in folder.glob("[0-9][0-9][0-9]")]
    named = [path.name for path in (folder / "tests").glob("*") if path.with_name(path.name + ".out").is_file()]
    return sorted(numbered) + sorted(named)


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs tests of the iotests in *folder* with *tools* on images of one format; logs are kept in *logs*.

    *options* are given to the creation of every image, as check's ``-o`` does.
    """

    folder: Path
    tools: Toolset
    image_format: str
    logs: Path
    seconds: float
    options: str = ""
    _running: set[int] = field(default_factory=set)

    def run_all(self, tests: Sequence[str], jobs: int, report: Callable[[Outcome], None]) -> list[Outcome]:
        """Run the tests, *jobs* at a time, calling *report* for each as it ends; the result is in the order of *tests*.

        An exception in the calling thread, such as KeyboardInterrupt, ends the tests that are running; they have no outcome then.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        stopped = threading.Event()

        def run_and_report(test: str) -> Outcome:
            outcome = self.run(test)
            if not stopped.is_set():
                report(outcome)
            return outcome

        with ThreadPoolExecutor(jobs, thread_name_prefix="iotest") as pool:
            try:
                return list(pool.map(run_and_report, tests))
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for group in list(self._running):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(group, signal.SIGKILL)
                raise

    def run(self, test: str) -> Outcome:
        """Run one test to its end, or to the time limit; again where QEMU's own process says that the machine was too busy for it."""
        for _ in range(_ATTEMPTS - 1):
            outcome, output = self._run_once(test)
            if outcome.status == "pass" or not any(text in output for text in _TOO_BUSY):
                return outcome
        return self._run_once(test)[0]

    def _run_once(self, test: str) -> tuple[Outcome, str]:
        """Return the outcome and everything that check printed."""
        # Short: paths of sockets below it have to fit into 107 bytes, and two messages of iotests depend on the length.
        with tempfile.TemporaryDirectory(prefix="iot-", ignore_cleanup_errors=True) as name:
            scratch = Path(name)
            uses = scratch / "uses"
            environment = {
                **os.environ,
                **self.tools.environment,
                "TEST_DIR": str(scratch / "t"),
                "SOCK_DIR": str(scratch / "s"),
                USES_VARIABLE: str(uses),
            }
            started = time.monotonic()
            output = self._check(test, environment)
            seconds = round(time.monotonic() - started, 1)
            (self.logs / f"{test}.log").write_text(output or "", errors="surrogateescape")
            bad = scratch / "t" / f"{test}.out.bad"
            if bad.exists():
                shutil.copyfile(bad, self.logs / f"{test}.out.bad")
            used = tuple(sorted(set(uses.read_text().split()))) if uses.exists() else ()
        today = time.strftime("%Y-%m-%d", time.gmtime())
        if output is None:
            late = f"no end after {self.seconds:.0f} s"
            return Outcome(test, "timeout", seconds, late, used, today, self.tools.identity), ""
        status, detail = parse(
            test, output.replace(str(scratch / "t"), "TEST_DIR").replace(str(scratch / "s"), "SOCK_DIR")
        )
        return Outcome(test, status, seconds, detail, used, today, self.tools.identity), output

    def _check(self, test: str, environment: dict[str, str]) -> str | None:
        """Return what check printed, or None after the time limit; whatever the test left running is killed."""
        options = ["-o", self.options] if self.options else []
        command = [sys.executable, "check", f"-{self.image_format}", *options, test]
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="surrogateescape",
        ) as process:
            self._running.add(process.pid)
            try:
                output, _ = process.communicate(timeout=self.seconds)
            except subprocess.TimeoutExpired:
                output = None
            finally:
                self._running.discard(process.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                _kill_marked(environment[USES_VARIABLE])
            return output


def _kill_marked(mark: str) -> None:
    """Kill the processes that carry this test's mark in their environment: daemons leave the session that they began in."""
    wanted = f"{USES_VARIABLE}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def parse(test: str, output: str) -> tuple[Status, str]:
    """Return the status in check's output and a detail: the reason, or the first line that differs from the reference."""
    for line in output.replace("\r", "\n").splitlines():
        match = _RESULT.match(line)
        if match is not None and match["test"] == test:
            text = _LAST_TIME.sub("", match["text"]).strip()
            status: Status = match["status"]  # type: ignore[assignment]
            if status == "fail":
                text = first_difference(output) or text
            return status, text
    lines = output.strip().splitlines()
    return "fail", lines[-1] if lines else "check printed nothing"


def first_difference(output: str) -> str:
    """Return the first added line of check's diff, or the first removed one where nothing was added."""
    marked = [match for line in output.splitlines() if (match := _DIFFERENCE.fullmatch(line)) and match[1].strip()]
    added = [match[1].strip() for match in marked if match[0].startswith("+")]
    removed = [match[1].strip() for match in marked]
    return (added or removed or [""])[0][:160]

"""Runs hostile images in worker processes, and says what went wrong with which of them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.tools.patience import PATIENCE

_ROOT = Path(__file__).resolve().parents[2]
#: Seconds by the clock after which a worker is taken to hang: a limit for deadlocks; processor time has a limit of its own.
_HANGS_AFTER = 60.0
#: Workers that may die before the rest of the images is given up.
_MOST_DEATHS = 5


class Worker:
    """One worker process; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": f"{_ROOT / 'src'}{os.pathsep}{_ROOT}",
            "PYTHONFAULTHANDLER": "1",
        }
        self._errors = folder / "worker.stderr"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.worker", str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=_ROOT, env=environment, text=True,
            )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def ask(self, name: str) -> dict[str, Any] | None:
        """Return the answer about one image; None when the worker did not survive it (see :attr:`last_words`)."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(name + "\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], _HANGS_AFTER)
        if not ready:
            process.send_signal(signal.SIGABRT)  # faulthandler shows where it is
        line = process.stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer

    @property
    def last_words(self) -> str:
        """What the process wrote to its standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        return f"the process ended ({self._process.poll()}) or hung:\n{self._errors.read_text()[-6000:]}"


def run(names: Iterable[str], folder: Path) -> list[dict[str, Any]]:
    """Treat the images of these *names*, one after the other; return all answers, a worker's death being one."""
    left = list(names)
    answers: list[dict[str, Any]] = []
    deaths = 0
    while left and deaths < _MOST_DEATHS:
        with Worker(folder) as worker:
            while left:
                name = left.pop(0)
                answer = worker.ask(name)
                if answer is None:
                    answers.append({"name": name, "failure": worker.last_words})
                    deaths += 1
                    break
                answers.append(answer)
    return answers


def check(names: Iterable[str], folder: Path) -> list[dict[str, Any]]:
    """Run *names* and fail, listing each image that went wrong; return the answers."""
    answers = run(names, folder)
    assert answers
    failed = [answer for answer in answers if answer["failure"]]
    report = "\n\n".join(f"{answer['name']}:\n{answer['failure']}" for answer in failed[:20])
    assert not failed, f"{len(failed)} of {len(answers)} images:\n{report}"
    return answers

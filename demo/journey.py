"""Running and recording the demonstration's steps: commands as a user types them, what they say, how long they take."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class StepFailed(Exception):
    """A step did not do what it must."""


@dataclass(slots=True)
class Command:
    """One command line and what came of it."""

    line: str
    output: str
    seconds: float
    status: int


@dataclass(slots=True)
class Step:
    """One step of the story: words, commands, pictures (SVG) and facts."""

    title: str
    words: str
    commands: list[Command] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


class Journey:
    """The steps so far, in the folder where all images lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[Step] = []
        self.figures: list[tuple[str, str]] = []  #: what the page says first: value and words
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return time.monotonic() - self.began

    def step(self, title: str, words: str) -> Step:
        """Begin the next step."""
        print(f"\n== {title}")
        self.steps.append(Step(title, words))
        return self.steps[-1]

    def cowhand(self, *arguments: str, status: int = 0, quiet: bool = False) -> str:
        """Run cowhand; raises StepFailed unless it ends with *status*. Returns standard output."""
        return self._run(["cowhand", *arguments], [sys.executable, "-m", "cowhand", *arguments], status, quiet)

    @contextmanager
    def running(self, *arguments: str) -> Iterator[None]:
        """Run cowhand while the block does something else; what it said goes into the step in the end."""
        begin = time.monotonic()
        command = [sys.executable, "-m", "cowhand", *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUTF8": "1"},
        )
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line.rstrip())
                if "Ctrl-C" in line:
                    break
            else:
                raise StepFailed(f"{shlex.join(command)} ended:\n" + "\n".join(said))
            yield
        finally:
            process.terminate()
            said += process.communicate()[0].splitlines()
        line = shlex.join(["cowhand", *arguments])
        print(f"$ {line}")
        print("\n".join(f"   {part}" for part in said))
        self.steps[-1].commands.append(Command(line, "\n".join(said), time.monotonic() - begin, 0))

    def json(self, *arguments: str, status: int = 0) -> Any:
        """Run cowhand for its JSON, without showing it."""
        return json.loads(self.cowhand(*arguments, "--output", "json", status=status, quiet=True))

    def picture(self, caption: str, *arguments: str) -> None:
        """Let cowhand draw a picture; it goes into the current step."""
        self.steps[-1].pictures.append((caption, self.cowhand(*arguments, "--svg", "-", quiet=True)))

    def tool(self, program: str, *arguments: str, status: int = 0) -> str:
        """Run another program, a judge that is not ours."""
        return self._run([os.path.basename(program), *arguments], [program, *arguments], status, False)

    def fact(self, name: str, value: str) -> None:
        """Tell a figure."""
        print(f"   {name}: {value}")
        self.steps[-1].facts.append((name, value))

    def _run(self, shown: list[str], command: list[str], status: int, quiet: bool) -> str:
        begin = time.monotonic()
        environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, env={**environment, "PYTHONUTF8": "1"}
        )
        seconds = time.monotonic() - begin
        line = shlex.join(shown)
        text = (done.stdout + done.stderr).rstrip()
        if done.returncode != status:
            raise StepFailed(f"{line}\nended with {done.returncode} and not {status}:\n{text}")
        if not quiet:
            print(f"$ {line}   ({seconds:.2f} s)")
            print("\n".join(f"   {part}" for part in text.splitlines()[:12]))
            self.steps[-1].commands.append(Command(line, text, seconds, done.returncode))
        return done.stdout


def digest(path: Path) -> str:
    """Return the SHA-256 of a file: a judgement that has nothing to do with cowhand."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

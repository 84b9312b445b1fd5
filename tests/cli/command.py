"""Running the ``cowhand`` command in a process of its own, as users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from tests.tools.patience import PATIENCE

#: Of the caller's surroundings that would change what is printed.
_UNSET = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "COWHAND_CLOCK")

Argument = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Done:
    """What a command did."""

    status: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """Return standard output as JSON."""
        return json.loads(self.stdout)

    def error(self) -> dict[str, Any]:
        """Return the error that a command with ``--output json`` told."""
        error: dict[str, Any] = json.loads(self.stderr.splitlines()[-1])["error"]
        return error


def surroundings(**more: str) -> dict[str, str]:
    """Return an environment in which output does not depend on the caller's."""
    kept = {name: value for name, value in os.environ.items() if name not in _UNSET}
    return {**kept, "LC_ALL": "C.UTF-8", "TZ": "UTC", **more}


def command_line(*arguments: Argument) -> list[str]:
    """Return how this interpreter's ``cowhand`` is started."""
    return [sys.executable, "-m", "cowhand", *map(os.fspath, arguments)]


def start(*arguments: Argument, **settings: Any) -> subprocess.Popen[str]:
    """Start ``cowhand``; the caller waits for it."""
    return subprocess.Popen(
        command_line(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        env=surroundings(),
        **settings,
    )


def cowhand(*arguments: Argument, status: int = 0, cwd: Argument | None = None, **environment: str) -> Done:
    """Run ``cowhand`` to its end. Asserts the exit *status*, and that no traceback was printed."""
    done = subprocess.run(
        command_line(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env=surroundings(**environment),
        cwd=cwd,
        timeout=PATIENCE,
    )
    told = f"{arguments}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
    assert "Traceback" not in done.stderr, told
    assert done.returncode == status, f"exit status {done.returncode} and not {status}: {told}"
    return Done(done.returncode, done.stdout, done.stderr)

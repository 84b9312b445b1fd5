"""Real programs that tests work with: found, replaceable by an environment variable, and required by name in CI.

``COWHAND_QEMU_IMG=/somewhere/qemu-img`` replaces ``qemu-img``, and so on for each name.
``COWHAND_REQUIRE="qemu-img nbdkit"`` makes the absence of these a failure instead of a skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from cowhand.cli.compat import profiles
from tests.tools.patience import PATIENCE

#: What QEMU's tools say when the processor time of a key derivation cannot be told, which happens now and then on virtual
#: machines; they have written nothing of use by then, and the same command succeeds the next time.
UNSTEADY_CLOCK = "Unable to get accurate CPU usage"
ATTEMPTS = 5


class ProgramMissing(Exception):
    """A program that a test calls is not on this machine."""


class ProgramFailed(Exception):
    """A program that had to succeed did not; the message holds everything that it said."""

    def __init__(self, result: Result) -> None:
        super().__init__(
            f"{' '.join(result.command)}\nexit status {result.status}\n--- stdout\n{result.stdout}\n--- stderr\n{result.stderr}"
        )
        self.result = result


@dataclass(frozen=True, slots=True)
class Result:
    """What a program did: its command, exit status and output as text."""

    command: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """Return standard output as JSON."""
        return json.loads(self.stdout)


def variable(name: str) -> str:
    """Return the environment variable that replaces the program: ``qemu-img`` → ``COWHAND_QEMU_IMG``."""
    return "COWHAND_" + re.sub(r"[^A-Z0-9]", "_", name.upper())


def find(name: str) -> str | None:
    """Return the program's path, or None. System administration folders are searched too (mkfs.ext4 lies there)."""
    replaced = os.environ.get(variable(name))
    if replaced:
        return replaced
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return shutil.which(name, path=path)


def required() -> frozenset[str]:
    """Return the names in COWHAND_REQUIRE."""
    return frozenset(os.environ.get("COWHAND_REQUIRE", "").replace(",", " ").split())


def run(
    name: str,
    *arguments: str | os.PathLike[str],
    check: bool = True,
    stdin: str = "",
    timeout: float = PATIENCE,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Run a program to its end in the C locale and UTC.

    Raises: ProgramMissing; ProgramFailed when *check* and the status is not 0; subprocess.TimeoutExpired.
    """
    path = find(name)
    if path is None:
        raise ProgramMissing(f"{name} is not installed ({variable(name)} may name it)")
    command = (path, *(os.fspath(argument) for argument in arguments))
    settings = {**os.environ, "LC_ALL": "C", "TZ": "UTC", **(environment or {})}
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=settings,
            cwd=cwd,
            errors="surrogateescape",
        )
        if done.returncode == 0 or UNSTEADY_CLOCK not in done.stderr:
            break
    result = Result(command, done.returncode, done.stdout, done.stderr)
    if check and done.returncode != 0:
        raise ProgramFailed(result)
    return result


@lru_cache
def version(name: str) -> tuple[int, ...]:
    """Return the first dotted number that ``NAME --version`` prints. Raises ProgramMissing."""
    result = run(name, "--version", check=False)
    match = re.search(r"\d+(?:\.\d+)+", result.stdout + result.stderr)
    if match is None:
        raise ProgramMissing(f"{name} --version names no version: {result.stdout!r}")
    return tuple(int(part) for part in match[0].split("."))


@lru_cache
def installed_profile() -> str:
    """Return the profile of the installed QEMU: what its answers are compared with. The newest where there is none, or a later one."""
    try:
        installed = version("qemu-img")
    except (ProgramMissing, OSError, subprocess.SubprocessError):
        return profiles.NEWEST
    try:
        return profiles.profile_of(".".join(map(str, installed)))
    except profiles.UnknownVersion:
        return profiles.NEWEST


def require(*names: str, at_least: Sequence[int] = ()) -> pytest.MarkDecorator:
    """Return a mark that skips where one of the programs is absent (or the first one too old), unless it is required.

    A required one that is absent makes the test fail with ProgramMissing where it calls it.
    """
    absent = [name for name in names if find(name) is None and name not in required()]
    if absent:
        return pytest.mark.skipif(True, reason=f"needs {', '.join(absent)}")
    if at_least and find(names[0]) is not None and version(names[0]) < tuple(at_least):
        wanted = ".".join(map(str, at_least))
        return pytest.mark.skipif(True, reason=f"needs {names[0]} {wanted} or newer")
    return pytest.mark.skipif(False, reason="every program is there")

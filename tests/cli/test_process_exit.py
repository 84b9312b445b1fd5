"""How a tool's process ends: at once, but for what still has to be done."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import atexit, sys, threading, time
from cowhand.cli import process_exit
{prepare}
sys.stdout.write("said")
sys.exit(process_exit.leave({status}))
"""


def end(prepare: str = "", status: int = 0, **redirection: object) -> subprocess.CompletedProcess[str]:
    program = _PROGRAM.format(prepare=prepare, status=status)
    return subprocess.run(
        [sys.executable, "-c", program], text=True, check=False, stderr=subprocess.PIPE, **redirection
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("status", [0, 3])
def test_output_is_written_and_the_status_passed(status: int) -> None:
    done = end(status=status, stdout=subprocess.PIPE)
    assert (done.stdout, done.stderr, done.returncode) == ("said", "", status)


@pytest.mark.parametrize(
    "prepare",
    [
        "atexit.register(lambda: sys.stdout.write(' at the end'))",
        "threading.Thread(target=lambda: (time.sleep(0.2), sys.stdout.write(' at the end'))).start()",
    ],
)
def test_what_is_left_is_done(prepare: str) -> None:
    assert end(prepare, stdout=subprocess.PIPE).stdout == "said at the end"


def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = end(stdout=full)
    assert done.returncode != 0
    assert "No space left" in done.stderr

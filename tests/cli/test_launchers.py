"""Ctrl-C from the first moment to the last: the installed commands end with 130, or by the signal itself, and never with a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.command import start, surroundings

LAUNCHERS = Path(__file__).parents[2] / "tools" / "launchers"


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """Return a folder with the launchers beside an interpreter, as an installation has them."""
    for tool in LAUNCHERS.iterdir():
        (tmp_path / tool.name).write_bytes(tool.read_bytes())
        (tmp_path / tool.name).chmod(0o755)
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("tool", ["cowhand", "cowhand-img"])
def test_an_interrupt_at_any_moment(tool: str, bin_folder: Path) -> None:
    (bin_folder / "disk.raw").write_bytes(bytes(1 << 20))
    ended = set()
    for milliseconds in range(0, 160, 4):
        with subprocess.Popen(
            [bin_folder / tool, "info", "disk.raw"],
            cwd=bin_folder,
            env=surroundings(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            time.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert "Traceback" not in err and "Fatal" not in err and "ignored" not in err, err
        ended.add(process.returncode)
    assert ended <= {0, 130, -signal.SIGINT}
    assert ended != {0}


def test_the_launchers_run_what_they_are_named_for(bin_folder: Path) -> None:
    (bin_folder / "links").mkdir()
    (bin_folder / "links" / "qemu-img").symlink_to(bin_folder / "cowhand-img")
    for command, text in (
        ("cowhand", "cowhand "),
        ("cowhand-io", "cowhand-io version"),
        ("links/qemu-img", "qemu-img version"),
    ):
        done = subprocess.run(
            [bin_folder / command, "--version"], capture_output=True, text=True, env=surroundings(), check=True
        )
        assert done.stdout.startswith(text)


def test_the_module_ends_quietly_when_it_has_begun(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(8 << 20))
    with start("convert", "-r", "1M", "-S", "0", "-p", "disk.raw", "copy.raw", cwd=tmp_path) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err

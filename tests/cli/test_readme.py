"""The README is true: its tour runs, its library example runs, and the pictures and pages that it names are there."""

from __future__ import annotations

import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cowhand.cli import main
from tests.cli.command import cowhand, surroundings
from tests.cli.images import MiB
from tests.tools.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def disk(image_dir: Path, rng: random.Random) -> Path:
    """Return a folder with disk.raw, which looks like an ext4 file system where the example looks."""
    data = bytearray(rng.randbytes(2 * MiB) + bytes(6 * MiB))
    data[1080:1082] = b"\x53\xef"
    (image_dir / "disk.raw").write_bytes(data)
    return image_dir


def test_the_tour_runs(disk: Path) -> None:
    lines = re.findall(r"^\$ cowhand (.+?)(?:\s+# exit code (\d+))?$", README, re.MULTILINE)
    assert len(lines) >= 10
    for arguments, status in lines:
        done = cowhand(*shlex.split(arguments), cwd=disk, status=int(status or 0))
        if not status:
            assert first_word_after(arguments) == done.stdout.split()[0]


def first_word_after(arguments: str) -> str:
    """Return the first word of standard output that the README shows for a command."""
    shown = README.split(f"$ cowhand {arguments}", 1)[1].splitlines()[1:]
    return next(line for line in shown if not line.startswith("cowhand")).split()[0]


def test_the_library_example_runs(disk: Path) -> None:
    cowhand("convert", "disk.raw", "vm.qcow2", cwd=disk)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    text = code[1] + "assert magic == b'\\x53\\xef'\n"
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=disk, env=surroundings(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    cowhand("compare", "vm.qcow2", "copy.qcow2", cwd=disk)
    assert "before" in cowhand("snapshot", "list", "vm.qcow2", cwd=disk).stdout


def test_what_it_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_names_every_command() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| commands |"))
    assert " ".join(main.COMMANDS) in row

"""A run in which much fails prints little, and ends with one line for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tools.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

FAILING = """
import sys
import pytest

BIG = bytes(range(256)) * 8192

def test_unequal_bytes():
    assert BIG == BIG[:-1] + b"x"

def test_unequal_lists():
    assert list(BIG) == [*BIG, 1]

def test_a_large_message():
    raise AssertionError("line\\n" * 500_000)

def test_a_large_output():
    sys.stdout.write("talk " * 500_000)
    sys.stderr.write("talk " * 500_000)
    assert False

@pytest.fixture
def broken():
    raise ValueError("x" * 2_000_000)

def test_a_broken_fixture(broken):
    pass

def test_that_passes():
    pass
"""


def test_a_failing_run_ends_with_a_short_list(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests import failures\nfrom tests.failures import pytest_runtest_makereport\nfailures.forget_ci()\n"
    )
    (tmp_path / "test_much.py").write_text(FAILING.replace("\\\\n", "\\n"))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra --tb=short\n")
    surroundings = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "CI": "true"}
    for more in ([], ["-n", "2"]):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *more, "."],
            cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(done.stdout) < 120_000, len(done.stdout)
        tail = done.stdout.splitlines()[-6:]
        assert sum(line.startswith(("FAILED ", "ERROR ")) for line in tail) == 5, tail
        assert all(len(line) < 400 for line in tail)
        assert "5 failed" in tail[-1] or "4 failed, 1 passed, 1 error" in tail[-1]

"""The page that tells how the tests went on each release of Debian."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import debian

FACTS = ["13.8", "qemu-img version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)", "Python 3.13.5", "6.18.44"]
PAGE = f"# Debian\n\n{debian.HEAD}\n|---|---|---|---|---|---|---|\n| bookworm (12.11) | then | `a` | 7.2.22 | 3.11.2 | 6 | passed |\n"


@pytest.mark.parametrize(
    ("log", "status", "said"),
    [
        ("...\n=== 5 passed, 2 skipped in 3.11s ===\nwrote demo\n", 0, "passed: 5 passed, 2 skipped in 3.11s"),
        ("\x1b[31m== 1 failed, 4 passed in 60.00s (0:01:00) ==\x1b[0m\n", 2, "**failed** (2): 1 failed, 4 passed in 60.00s (0:01:00)"),
        ("5 passed in 3.11s\n", 0, "passed: 5 passed in 3.11s"),
        ("ruff: no\n", 2, "**failed** (2): the tests did not run"),
    ],
)  # fmt: skip
def test_the_last_line_of_the_tests_tells(log: str, status: int, said: str) -> None:
    assert debian.result_of(log, status) == said


def test_a_run_replaces_the_row_of_its_release() -> None:
    first = debian.with_row(PAGE, "trixie", debian.row("trixie", 0, "abc", "5 passed in 1.00s\n", FACTS))
    assert first.count("| trixie (13.8) |") == 1
    assert "| 10.0.13 | 3.13.5 | 6.18.44 | passed: 5 passed in 1.00s |" in first
    second = debian.with_row(first, "trixie", debian.row("trixie", 2, "def", "", FACTS))
    assert second.count("| trixie ") == 1
    assert "| bookworm (12.11) | then |" in second
    assert "**failed** (2)" in second


def test_the_page_of_the_project_has_a_place_for_it() -> None:
    page = (Path(debian.__file__).resolve().parent.parent / "docs" / "debian.md").read_text(encoding="utf-8")
    assert debian.HEAD in page

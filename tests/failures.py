"""What failing tests print is bounded: a run of thousands of tests over megabytes of bytes ends with a list that can be read.

COWHAND_TEST_OUTPUT=N lets one failing test print N characters instead.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from _pytest._code.code import ReprExceptionInfo, ReprTracebackNative

#: Characters of one failing test's traceback and assertion, and of each section of captured output.
LIMIT = int(os.environ.get("COWHAND_TEST_OUTPUT") or "8000")
#: Characters of its line in the list at the end.
LINE = 160


def bounded(text: str, limit: int = LIMIT) -> str:
    """Return *text*, with its middle left out where it is longer than *limit* characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out (COWHAND_TEST_OUTPUT) ...\n{text[-half:]}"


def bound(report: Any) -> None:
    """Bound what *report*, of a test or of a collection, is going to print."""
    report.sections = [(title, bounded(content)) for title, content in report.sections]
    shown = report.longrepr
    if not report.failed or shown is None:
        return
    crash = getattr(shown, "reprcrash", None)
    if crash is not None:
        crash.message = _line(crash.message)
    text = str(shown)
    if len(text) > LIMIT:
        kept = bounded(text)
        # What travels from a worker is text, or one of pytest's own records.
        report.longrepr = kept if crash is None else ReprExceptionInfo(ReprTracebackNative([kept]), crash)


def _line(message: str) -> str:
    first = message.strip().split("\n", 1)[0]
    return first if len(first) <= LINE else first[: LINE - 3] + "..."


def forget_ci() -> None:
    """Take away the variables at which pytest prints everything in full: how a program was started says nothing of who reads."""
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Bound each report where it is made: in a worker, before it is sent."""
    report = yield
    bound(report)
    return report

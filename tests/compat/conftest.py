"""What the tests of the drop-in tools share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cowhand.cli.compat import profiles, program
from tests.tools.programs import installed_profile


@pytest.fixture
def as_7_2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the tools, and the functions that are called without one, answer as 7.2, whatever is installed."""
    monkeypatch.setenv(profiles.VARIABLE, "7.2")
    program.use_profile("7.2")
    yield
    program.use_profile(installed_profile())

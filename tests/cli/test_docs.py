"""``docs/cli.md`` tells of every option of every command, and of no other; its exit codes are those of the errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cowhand.cli import main
from cowhand.cli.commands import check, compare
from cowhand.cli.running import EXIT_INTERNAL
from tests.house.test_errors import CLASSES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    """Return what the page says of a command."""
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/cli.md has no section {name}"
    return found[1]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_option_is_documented_and_exists(name: str) -> None:
    parser = main.build_parser(name, main.load(name))
    lines = [line for line in section(name).splitlines() if line.startswith("| `")]
    documented = {word for line in lines for word in re.findall(r"`(--?[a-zA-Z][\w-]*)`", line.split(" | ")[0])}
    exist = {option for action in vars(parser)["_actions"] for option in action.option_strings} - {"-h", "--help"}
    assert documented == exist


def test_exit_codes_are_documented() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    used = {kind.exit_code for kind in CLASSES} | {
        0,
        main.EXIT_USAGE,
        EXIT_INTERNAL,
        compare.EXIT_DIFFERENT,
        check.EXIT_LEAKS,
        check.EXIT_DAMAGE,
    }
    assert used <= documented


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_is_as_wide_as_the_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    text = main.build_parser(name, main.load(name)).format_help()
    prose, _, examples = text.partition("Examples:\n")
    assert max(map(len, prose.splitlines())) <= 72
    assert f"cowhand {name}" in examples.splitlines()[0]

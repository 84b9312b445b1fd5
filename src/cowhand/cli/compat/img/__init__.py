"""``cowhand-img``: takes qemu-img's commands and options, and answers as it does. One command a file; only the one asked for is imported."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import Grammar, options
from cowhand.cli.compat.program import UsageFailure

COMMANDS = (
    "amend",
    "bench",
    "bitmap",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "dd",
    "info",
    "map",
    "measure",
    "rebase",
    "snapshot",
    "resize",
)
_STANDARD = Grammar("hVT:", {"help": "h", "version": "V", "trace": "T", "compat": "compat="}, permute=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool with *arguments*, ``argv[0]`` first (those of the process by default), and return the exit status."""
    return program.main(_run, arguments, "cowhand-img")


def _run(arguments: Sequence[str]) -> int:
    rest: list[str] = []
    for key, value in options(_STANDARD, arguments, rest):
        if key == "V":
            print(program.version_lines())
            return 0
        if key == "h":
            return show_help()
        if key == "compat":
            program.use_profile(value)
            continue
        from cowhand.cli.compat import tracing

        tracing.accept(value)
    if not rest:
        raise UsageFailure("Not enough arguments")
    name = rest[0]
    if name not in COMMANDS:
        raise UsageFailure(f"Command not found: {name}")
    program.enter(name)
    status: int = importlib.import_module(f"cowhand.cli.compat.img.{name}").run(rest)
    return status


def show_help() -> int:
    """Print the one help of all commands."""
    from cowhand.cli.compat.img.help import text

    print(text())
    return 0

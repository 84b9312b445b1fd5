"""``-T``: QEMU's trace events. There are none here, so each that is named is warned of and the rest accepted."""

from __future__ import annotations

import os

from cowhand.cli.compat import program
from cowhand.cli.compat.optionstrings import parse
from cowhand.cli.compat.program import Failure


def accept(text: str) -> None:
    """Check the argument of ``-T`` and warn of events that it enables. Raises Failure."""
    for pair in parse(text, "enable"):
        if pair.name == "enable":
            _enable(pair.value)
        elif pair.name == "events":
            _enable_listed(pair.value)
        elif pair.name == "file":
            _open_log(pair.value)
        else:
            raise Failure(f"Invalid parameter '{pair.name}'")


def _enable(pattern: str) -> None:
    if pattern in ("help", "?"):
        raise Failure(status=0)  # the list of events has no entries
    name = pattern.removeprefix("-")  # "-NAME" disables
    if "*" not in name and "?" not in name:
        program.warning(f"trace event '{name}' does not exist")


def _open_log(path: str) -> None:
    """Make the file that events would go to, as QEMU does: who names one that cannot be made hears of it."""
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise Failure(f"Error opening logfile {path}: {os.strerror(error.errno or 0)}") from None


def _enable_listed(path: str) -> None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.strip() and not line.startswith("#"):
                    _enable(line.strip())
    except OSError as error:
        program.plain(f"{program.name()}:{path}: {os.strerror(error.errno or 0)}")
        raise Failure from None

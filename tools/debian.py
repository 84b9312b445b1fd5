"""Record what a run of ``.ci/run`` on a release of Debian said: ``python tools/debian.py PAGE SUITE STATUS COMMIT LOG``; facts on standard input.

The facts are lines: Debian's version, ``qemu-img --version``, ``python3 --version``, the kernel. Each release has one row in the page's table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

HEAD = "| release | run on (UTC) | commit | QEMU | Python | kernel | result |"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def result_of(log: str, status: int) -> str:
    """Return the sentence of a log that tells how the tests ended, and whether all of ``.ci/run`` passed."""
    endings = re.findall(r"^=* ?(\d+ (?:passed|failed|error)[^\n]*?) ?=*$", _COLOURS.sub("", log), re.MULTILINE)
    tests = endings[-1] if endings else "the tests did not run"
    return f"{'passed' if status == 0 else f'**failed** ({status})'}: {tests}"


def row(suite: str, status: int, commit: str, log: str, facts: Sequence[str]) -> str:
    """Return the row of a run."""
    debian, qemu, python, kernel = (line.strip() for line in facts)
    match = re.search(r"version (\S+)", qemu)
    cells = [
        f"{suite} ({debian})",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        f"`{commit}`",
        match[1] if match else qemu,
        python.removeprefix("Python "),
        kernel,
        result_of(log, status),
    ]
    return "| " + " | ".join(cells) + " |"


def with_row(page: str, suite: str, new: str) -> str:
    """Return *page* with the row of *suite* replaced, or added below the table's head."""
    kept = [line for line in page.splitlines() if not line.startswith(f"| {suite} ")]
    at = kept.index(HEAD) + 2
    return (
        "\n".join(
            [*kept[:at], *sorted([new, *(line for line in kept[at:] if line.startswith("| "))]), *_after(kept[at:])]
        )
        + "\n"
    )


def _after(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if not line.startswith("| ")]


def main(arguments: Sequence[str]) -> int:
    """Rewrite the page; returns the exit status."""
    page, suite, status, commit, log = arguments
    path = Path(page)
    new = row(suite, int(status), commit, Path(log).read_text(errors="replace"), sys.stdin.read().splitlines())
    path.write_text(with_row(path.read_text(encoding="utf-8"), suite, new), encoding="utf-8")
    print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

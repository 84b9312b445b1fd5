"""The table that `make bench` prints, as text, Markdown and JSON."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import Row, program, spawn

HEADER = ("work", "peer", "goal", "today", "quartiles", "ours s", "peer s", "ours cpu", "peer cpu", "size")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells as text."""
    ours = statistics.median(sample.wall for sample in row.ours)
    cpu = statistics.median(sample.cpu for sample in row.ours)
    if not row.peer:
        goal = f"{row.goal:.3f}" if row.unit == "s" else f"{row.goal:g}"
        return (row.name, row.peer_name, goal, mark(row), "", f"{ours:.3f}", "", f"{cpu:.3f}", "", "")
    peer = statistics.median(sample.wall for sample in row.peer)
    peer_cpu = statistics.median(sample.cpu for sample in row.peer)
    low, high = row.spread
    size = "" if row.size_ratio is None else f"{row.size_ratio:.3f} (≤ {row.size_goal:g})"
    return (
        row.name,
        row.peer_name,
        f"{row.goal:.2f}" if row.goal is not None else "",
        mark(row),
        f"{low:.2f}-{high:.2f}",
        f"{ours:.3f}",
        f"{peer:.3f}",
        f"{cpu:.3f}",
        f"{peer_cpu:.3f}" if peer_cpu else "",
        size,
    )


def mark(row: Row) -> str:
    """Return the measured figure, with a sign where the goal is missed."""
    alone = f"{row.ratio:.3f} s" if row.unit == "s" else f"{row.ratio:.0f} {row.unit}"
    figure = alone if not row.peer else f"{row.ratio:.2f}"
    return figure if row.reached else f"{figure} ✗"


def text(rows: Sequence[Row]) -> str:
    """Return an aligned table."""
    table = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def document(rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything as one JSON document."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": settings,
        "rows": [
            {
                "work": row.name,
                "peer": row.peer_name,
                "goal": row.goal,
                "median": row.ratio,
                "unit": row.unit,
                "reached": row.reached,
                "size-ratio": row.size_ratio,
                "size-goal": row.size_goal,
                "ours": [{"wall": sample.wall, "cpu": sample.cpu, "size": sample.size} for sample in row.ours],
                "theirs": [{"wall": sample.wall, "cpu": sample.cpu, "size": sample.size} for sample in row.peer],
            }
            for row in rows
        ],
    }


def machine() -> dict[str, str]:
    """Say what this ran on."""
    return {
        "cpus": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "qemu-img": _version(),
    }


def _version() -> str:
    path = Path(os.environ.get("TMPDIR", "/tmp"), f"bench-version-{os.getpid()}")
    try:
        spawn(program("qemu-img"), "--version", output=path)
        return path.read_text().split("\n")[0].removeprefix("qemu-img version ")
    finally:
        path.unlink(missing_ok=True)


def markdown(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Return docs/performance.md."""
    facts = machine()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        "# Performance",
        "",
        f"Measured on {date} by `make bench` (`bench/run.py --write-docs`): {facts['cpus']} CPUs, {facts['system']}, Python "
        f"{facts['python']}, qemu-img {facts['qemu-img']}. {settings['data']} of real files in a disk of twice the size, "
        f"{settings['rounds']} rounds.",
        "",
        "*today* is the median of the ratios of wall time, ours to the peer's, of pairs that ran right after one another in alternating",
        "order; below 1 is faster. ✗: the goal is missed. Seconds are medians; *size* is our output's to the peer's. Machines are",
        "shared and their speed wanders: look at the quartiles before at the last digit. Rows *bytes alone* are no work of cowhand's: two",
        "threads of a bare Python process that only move or compare the bytes (`bench/bare.py`), which is how near to a goal one can come here.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"

"""QEMU's tools as the partner of interop tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.tools.patience import PATIENCE
from tests.tools.programs import Result, require, run

require_qemu = require("qemu-img", "qemu-io")
require_qemu_nbd = require("qemu-nbd")
require_qemu_system = require("qemu-system-x86_64")

Argument = str | os.PathLike[str]


def qemu_img(*arguments: Argument, check: bool = True, timeout: float = PATIENCE) -> Result:
    """Run qemu-img. Raises ProgramFailed when *check* and it fails."""
    return run("qemu-img", *arguments, check=check, timeout=timeout)


def qemu_io(
    image: Argument,
    *commands: str,
    format: str | None = None,
    options: tuple[str, ...] = (),
    check: bool = True,
    timeout: float = PATIENCE,
) -> Result:
    """Run qemu-io's *commands* on *image*, in order.

    qemu-io exits 0 after a failed command or pattern in some versions; with *check*, output that names a failure raises as well.
    Raises: AssertionError with the output, ProgramFailed.
    """
    arguments: list[Argument] = [*options]
    if format is not None:
        arguments += ["-f", format]
    for command in commands:
        arguments += ["-c", command]
    result = run("qemu-io", *arguments, image, check=check, timeout=timeout)
    if check:
        output = result.stdout + result.stderr
        assert "failed" not in output and "Pattern verification" not in output, output
    return result


def qemu_info(image: Argument, format: str | None = None) -> dict[str, Any]:
    """Return ``qemu-img info --output json``."""
    chosen = () if format is None else ("-f", format)
    info: dict[str, Any] = qemu_img("info", "--output=json", *chosen, image).json()
    return info


def qemu_map(image: Argument, format: str | None = None) -> list[dict[str, Any]]:
    """Return ``qemu-img map --output json``."""
    chosen = () if format is None else ("-f", format)
    rows: list[dict[str, Any]] = qemu_img("map", "--output=json", *chosen, image).json()
    return rows


def assert_clean(image: Path, format: str = "qcow2", leaks_allowed: bool = False) -> dict[str, Any]:
    """Assert that ``qemu-img check`` finds neither corruption nor (unless allowed) leaks; return its JSON."""
    result = qemu_img("check", "--output=json", "-f", format, image, check=False)
    assert result.status in ((0, 3) if leaks_allowed else (0,)), result.stdout + result.stderr
    report: dict[str, Any] = result.json()
    assert report.get("corruptions", 0) == 0 and report["check-errors"] == 0, report
    return report


def assert_identical(first: Path, first_format: str, second: Path, second_format: str) -> None:
    """Assert that ``qemu-img compare`` finds the guest's bytes of both images equal; one may be longer by zeroes."""
    result = qemu_img("compare", "-f", first_format, "-F", second_format, first, second, check=False)
    assert result.status == 0, result.stdout + result.stderr

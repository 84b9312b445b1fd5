"""Starting a command costs what it needs: the modules that it imports are counted. Time is measured by ``make bench`` alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import surroundings
from tests.cli.images import MiB, fill, image
from tests.tools.patience import PATIENCE

#: Each costs as much as a whole small command, or more.
HEAVY = {
    "numpy",
    "rich",
    "asyncio",
    "cryptography",
    "isal",
    "concurrent.futures",
    "urllib",
    "http",
    "email",
    "multiprocessing",
    "unittest",
}
#: Prints what was imported, by the names of the outermost packages and of those in HEAVY.
PROBE = """
import sys
from cowhand.cli.main import main
status = main(sys.argv[1:])
print(status, *sys.modules, file=sys.stderr)
"""


def imported(*arguments: str, cwd: Path) -> set[str]:
    """Run the command in an interpreter without site packages' start files; return the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        capture_output=True,
        text=True,
        env=surroundings(),
        cwd=cwd,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    status, *modules = done.stderr.split()
    assert status == "0", done.stderr
    return set(modules)


@pytest.fixture
def folder(image_dir: Path) -> Path:
    base = image(image_dir / "base")
    image(image_dir / "work", backing=base)
    fill(image_dir / "work", 0, MiB, 1)
    (image_dir / "small.raw").write_bytes(bytes(range(256)) * 4096)
    return image_dir


COMMANDS = (
    ("info", "work"),
    ("info", "--chain", "work"),
    ("info", "--output", "json", "work"),
    ("map", "work"),
    ("map", "--output", "json", "work"),
    ("create", "-f", "qcow2", "new", "1G"),
    ("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "new"),
    ("convert", "-f", "raw", "-O", "qcow2", "small.raw", "new"),
    ("convert", "-O", "raw", "work", "new"),
    ("measure", "-O", "qcow2", "work"),
    ("resize", "work", "+1M"),
    ("snapshot", "list", "work"),
    ("compare", "work", "work"),
    ("--version",),
    ("--help",),
)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_nothing_heavy_is_imported(arguments: tuple[str, ...], folder: Path) -> None:
    assert not HEAVY & imported(*arguments, cwd=folder)


def test_only_the_parser_that_was_asked_for_is_built(folder: Path) -> None:
    modules = imported("info", "work", cwd=folder)
    assert {name for name in modules if name.startswith("cowhand.cli.commands.")} == {"cowhand.cli.commands.info"}


def test_info_imports_no_room_that_copies(folder: Path) -> None:
    modules = imported("info", "work", cwd=folder)
    assert not [
        name
        for name in modules
        if name.startswith(("cowhand.copy", "cowhand.jobs", "cowhand.cli.pictures", "cowhand.cli.compat"))
    ]


def test_json_is_imported_by_those_who_print_it(folder: Path) -> None:
    assert "json" not in imported("info", "work", cwd=folder)
    assert "json" in imported("info", "--output", "json", "work", cwd=folder)


def test_the_package_itself_imports_almost_nothing(folder: Path) -> None:
    text = "import sys; before = set(sys.modules); import cowhand; print(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env=surroundings(), timeout=PATIENCE
    )
    assert not {name for name in done.stdout.split() if name.startswith("cowhand.")} - {"cowhand.__about__"}

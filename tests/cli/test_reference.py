"""The reference pages are those of the code as it is; man pages are well-formed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cowhand.cli.main import COMMANDS
from cowhand.cli.running import EXIT_INTERNAL
from cowhand.drivers import REGISTRY
from tests.tools.patience import PATIENCE
from tools import reference


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return reference.pages()


def test_committed_pages_are_current(made: dict[str, str]) -> None:
    assert reference.outdated(made, reference.DOCS) == [], "run make docs"


def test_each_command_and_driver_has_its_pages(made: dict[str, str]) -> None:
    for name in COMMANDS:
        assert {f"commands/{name}.md", f"man/cowhand-{name}.1"} <= set(made)
    assert all(f"drivers/{entry.name}.md" in made for entry in REGISTRY)


def test_pages_tell_of_options_and_defaults(made: dict[str, str]) -> None:
    assert "| `cluster_size` | size | `65536` | qcow2 cluster size |" in made["drivers/qcow2.md"]
    assert "| `-f`, `--format` FMT | format of the new image |" in made["commands/create.md"]


def test_changed_and_forgotten_pages_are_noticed_and_mended(tmp_path: Path) -> None:
    made = {"commands/a.md": "text\n", "man/a.1": "text\n"}
    assert reference.outdated(made, tmp_path) == ["commands/a.md", "man/a.1"]
    reference.write(made, tmp_path)
    (tmp_path / "commands" / "a.md").write_text("changed by hand\n")
    (tmp_path / "commands" / "gone.md").write_text("a command that was\n")
    assert reference.write(made, tmp_path) == ["commands/a.md", "commands/gone.md"]
    assert reference.outdated(made, tmp_path) == []
    assert not (tmp_path / "commands" / "gone.md").exists()


def test_exit_codes_are_those_of_the_page_on_the_command() -> None:
    page = (reference.DOCS / "cli.md").read_text(encoding="utf-8")
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert {code for code, _ in reference.EXIT_CODES} == documented
    assert EXIT_INTERNAL in documented


def test_text_cannot_become_a_request_of_roff() -> None:
    assert reference._roff(".so /etc/passwd\n'x\n-a\\b") == "\\&.so /etc/passwd\n\\&'x\n\\-a\\eb"


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_man_pages_format_without_a_warning(made: dict[str, str], tmp_path: Path) -> None:
    for name in ("man/cowhand.1", "man/cowhand-create.1", "man/cowhand-dd.1"):
        path = tmp_path / Path(name).name
        path.write_text(made[name])
        done = subprocess.run(
            ["groff", "-man", "-ww", "-Tascii", "-z", str(path)], capture_output=True, text=True, timeout=PATIENCE
        )
        assert (done.returncode, done.stderr) == (0, "")

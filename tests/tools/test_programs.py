"""The helpers that run real programs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tools import programs


def script(folder: Path, text: str) -> Path:
    path = folder / "program"
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return path


def test_environment_replaces_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path, "import sys; print(sys.argv[1:]); print('oops', file=sys.stderr); sys.exit(3)")
    monkeypatch.setenv("COWHAND_MKFS_EXT4", str(path))
    result = programs.run("mkfs.ext4", "-F", tmp_path, check=False)
    assert (result.status, result.stdout, result.stderr) == (3, f"['-F', '{tmp_path}']\n", "oops\n")


def test_failure_carries_all_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWHAND_TOOL", str(script(tmp_path, "import sys; print('partial'); sys.exit('reason')")))
    with pytest.raises(programs.ProgramFailed, match=r"(?s)partial.*reason"):
        programs.run("tool")


def test_absent_program_is_skipped_unless_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COWHAND_REQUIRE", raising=False)
    assert programs.require("no-such-tool").mark.args == (True,)
    monkeypatch.setenv("COWHAND_REQUIRE", "other no-such-tool")
    assert programs.require("no-such-tool").mark.args == (False,)
    with pytest.raises(programs.ProgramMissing, match="COWHAND_NO_SUCH_TOOL"):
        programs.run("no-such-tool")


def test_version_is_the_first_dotted_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "COWHAND_VERSIONED", str(script(tmp_path, "print('versioned version 7.2.22 (Debian 1:7.2+dfsg)')"))
    )
    assert programs.version("versioned") == (7, 2, 22)
    assert programs.require("versioned", at_least=(8, 0)).mark.args == (True,)

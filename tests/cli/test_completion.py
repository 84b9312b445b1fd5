"""Completion scripts: bash's is asked for words, all are read by their shells where these are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cowhand.cli import completion, main, reference
from cowhand.cli.commands import completion as command
from tests.cli.command import cowhand
from tests.tools.patience import PATIENCE

FORMATS = ("raw", "qcow2")


@pytest.fixture(scope="module")
def known() -> list[reference.Command]:
    return reference.commands()


def completed(script: Path, *words: str) -> list[str]:
    """Return what bash would offer for the last of *words*."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"source '{script}'; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _cowhand; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, timeout=PATIENCE, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("cowhand", "co"), {"convert", "compare", "commit", "compact", "completion"}),
        (("cowhand", "create", "-f", "q"), {"qcow2"}),
        (("cowhand", "convert", "--cache", "writeb"), {"writeback"}),
        (("cowhand", "resize", "--sh"), {"--shrink"}),
        (("cowhand", "snapshot", "a"), {"apply"}),
        (("cowhand", "create", "-b", ""), set()),
    ],
)
def test_bash_offers_commands_options_and_values(
    words: tuple[str, ...], offered: set[str], known: list[reference.Command], tmp_path: Path
) -> None:
    path = tmp_path / "cowhand.bash"
    path.write_text(completion.script("bash", known, FORMATS))
    assert set(completed(path, *words)) == offered


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_command_and_option_is_in_the_script(shell: str, known: list[reference.Command]) -> None:
    script = completion.script(shell, known, FORMATS)
    for one in known:
        assert one.name in script
        for option in one.options:
            for flag in option.flags:
                assert (
                    (f"-l {flag[2:]}" if flag[:2] == "--" else f"-s {flag[1:]}") in script
                    if shell == "fish"
                    else flag in script
                )


@pytest.mark.parametrize(("shell", "check"), [("bash", "bash -n"), ("zsh", "zsh -n"), ("fish", "fish --no-execute")])
def test_script_is_read_by_its_shell(shell: str, check: str, known: list[reference.Command], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    path = tmp_path / "script"
    path.write_text(completion.script(shell, known, FORMATS))
    done = subprocess.run([*check.split(), str(path)], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


def test_command_prints_the_script_and_knows_the_same_shells(known: list[reference.Command]) -> None:
    done = cowhand("completion", "bash")
    assert done.status == 0
    assert "complete -F _cowhand cowhand" in done.stdout
    assert all(name in done.stdout for name in main.COMMANDS)
    parser = main.build_parser("completion", command)
    for shell in completion.SHELLS:
        assert parser.parse_args([shell]).shell == shell
    with pytest.raises(SystemExit):
        parser.parse_args(["csh"])


def test_quotes_in_help_do_not_end_the_quotation() -> None:
    option = reference.Argument(("-x",), "", "it's [odd]: \\ so", (), False, False, "")
    odd = reference.Command("odd", "it's odd", "", "", (option,), ())
    assert "it'\\''s \\[odd\\]\\: \\\\ so" in completion.script("zsh", [odd], FORMATS)
    assert "'it\\'s [odd]: \\\\ so'" in completion.script("fish", [odd], FORMATS)

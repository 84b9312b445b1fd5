"""The frame around every command: signals, exit codes, how errors are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cowhand.cli import main, running
from cowhand.cli.output import Output, printable
from cowhand.cli.running import Context
from cowhand.core.errors import Cancelled, CowhandError, ImageInUse, InvalidFormat, IOFailed, NoSpace
from tests.cli.command import cowhand, surroundings
from tests.tools.patience import PATIENCE


def command(work: Callable[[Namespace, Context], int], writes: bool = True) -> Any:
    """Return what looks like a command's module."""
    return SimpleNamespace(run=work, WRITES=writes)


def raising(error: BaseException) -> Any:
    def work(args: Namespace, context: Context) -> int:
        raise error

    return command(work)


def told(error: BaseException, capsys: pytest.CaptureFixture[str], output: str = "text") -> tuple[int, str]:
    status = running.run(raising(error), "info", Namespace(output=output))
    return status, capsys.readouterr().err


class TestErrors:
    def test_say_what_happened_where_and_what_to_do(self, capsys: pytest.CaptureFixture[str]) -> None:
        error = InvalidFormat("this is broken", path="/disk", offset=0x200, hint="Repair it.")
        assert told(error, capsys) == (4, "cowhand info: this is broken (/disk, offset 0x200)\n  Repair it.\n")

    def test_are_one_line_of_json_where_json_was_asked_for(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, text = told(ImageInUse("somebody writes", path="/disk").within("backing file 'x'"), capsys, "json")
        assert status == 5
        assert json.loads(text)["error"] == {
            "code": "in-use",
            "message": "somebody writes",
            "path": "/disk",
            "offset": None,
            "hint": None,
            "exit-code": 5,
            "within": ["backing file 'x'"],
        }

    @pytest.mark.parametrize(
        ("error", "status"),
        [(CowhandError("x"), 1), (IOFailed("x"), 3), (NoSpace("x"), 3), (InvalidFormat("x"), 4), (Cancelled("x"), 130)],
    )
    def test_have_exit_codes(self, error: CowhandError, status: int, capsys: pytest.CaptureFixture[str]) -> None:
        assert told(error, capsys)[0] == status

    def test_of_the_system_are_told_like_our_own(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, text = told(FileNotFoundError(2, "x", "/absent"), capsys)
        assert (status, text) == (1, "cowhand info: No such file or directory (/absent)\n")

    def test_that_nobody_expected_are_reported_with_their_traceback(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, text = told(ZeroDivisionError("oops"), capsys)
        assert status == running.EXIT_INTERNAL
        assert "Traceback" in text
        assert "internal error: ZeroDivisionError: oops" in text

    def test_too_little_memory(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert told(MemoryError(), capsys) == (1, "cowhand info: there is not enough memory\n")

    def test_cannot_steer_the_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, text = told(CowhandError("a\x1b]0;title\x07b\u202ec"), capsys)
        assert text == "cowhand info: a\\x1b]0;title\\x07b\\x202ec\n"


def test_printable_shows_bytes_that_are_no_text() -> None:
    assert printable("a\udcffb\nc\td") == "a\\xffb\\x0ac\\x09d"


class TestSignals:
    def run_and_signal(self, number: int, work: Callable[[Namespace, Context], int]) -> int:
        started = threading.Event()

        def wrapped(args: Namespace, context: Context) -> int:
            started.set()
            return work(args, context)

        def send() -> None:
            started.wait()
            os.kill(os.getpid(), number)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            return running.run(command(wrapped), "convert", Namespace())
        finally:
            sender.join()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_cancel_the_command(self, number: int, capsys: pytest.CaptureFixture[str]) -> None:
        def work(args: Namespace, context: Context) -> int:
            context.cancel.wait(PATIENCE)
            context.cancel.check()
            return 0

        before = signal.getsignal(number)
        assert self.run_and_signal(number, work) == 128 + number
        assert signal.getsignal(number) is before
        assert "stopping at the next safe point" in capsys.readouterr().err

    def test_that_come_too_late_change_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        def work(args: Namespace, context: Context) -> int:
            context.cancel.wait(PATIENCE)
            return 0

        assert self.run_and_signal(signal.SIGINT, work) == 0

    def in_process(self, work: str, *, writes: bool) -> subprocess.Popen[str]:
        text = f"""
import sys, time
from argparse import Namespace
from types import SimpleNamespace
from cowhand.cli import running
def work(args, context):
    print("started", flush=True)
    {work}
sys.exit(running.run(SimpleNamespace(run=work, WRITES={writes}), "x", Namespace()))
"""
        process = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings()
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        return process

    def test_twice_leaves_at_once(self) -> None:
        with self.in_process("time.sleep(100000)", writes=True) as process:
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert "safe point" in process.stderr.readline()
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130

    def test_a_reader_that_hangs_is_left(self) -> None:
        with self.in_process("time.sleep(100000)", writes=False) as process:
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130


class TestMain:
    def test_without_a_command_the_overview_goes_to_stderr(self) -> None:
        done = cowhand(status=2)
        assert done.stdout == ""
        assert all(name in done.stderr for name in main.COMMANDS)

    def test_help_names_every_command_and_the_exit_codes(self) -> None:
        done = cowhand("--help")
        assert all(f"  {name} " in done.stdout for name in main.COMMANDS)
        assert "130 interrupted" in done.stdout
        assert cowhand("help").stdout == done.stdout

    def test_version(self) -> None:
        import cowhand as package

        assert cowhand("--version").stdout == f"cowhand {package.__version__}\n"

    def test_a_wrong_command_gets_a_guess(self) -> None:
        assert "Did you mean 'convert'?" in cowhand("convrt", status=2).stderr
        assert "cowhand --help" in cowhand("xyzzy", status=2).stderr

    def test_a_wrong_option_says_where_the_help_is(self) -> None:
        assert "See: cowhand info --help" in cowhand("info", "--wrong", "x", status=2).stderr

    def test_what_was_probably_meant_is_told_in_two_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        for words, near in (
            (["convert", "--dryrun", "a", "b"], "--dry-run"),
            (["snapshot", "crate", "a", "b"], "create"),
            (["--verison"], "--version"),
            (["help", "inf"], "info"),
        ):
            with suppress(SystemExit):
                main.main(words)
            told = capsys.readouterr().err.splitlines()
            assert len(told) == 2
            assert f"Did you mean '{near}'?" in told[1]

    def test_a_wrong_command_line_is_told_in_json_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main.main(["map", "--output", "json", "a", "b"])
        error = json.loads(capsys.readouterr().err)["error"]
        assert (left.value.code, error["code"], error["exit-code"]) == (2, "usage", 2)
        assert error["message"] == "too many arguments: b"

    def test_help_is_found_from_either_side(self, capsys: pytest.CaptureFixture[str]) -> None:
        texts = []
        for words in (["help", "info"], ["--help", "info"], ["info", "--help"]):
            with pytest.raises(SystemExit):
                main.main(words)
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] == texts[2] != ""

    def test_an_encoding_without_pictures_gets_letters(self, tmp_path: Path) -> None:
        cowhand("create", tmp_path / "a.qcow2", "1M")
        drawn = cowhand("map", "--bar", tmp_path / "a.qcow2", PYTHONIOENCODING="ascii", PYTHONUTF8="0").stdout
        assert "\n  512 KiB ...." in drawn

    @pytest.mark.parametrize("name", main.COMMANDS)
    def test_every_command_has_help_with_examples(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        module = main.load(name)
        text = main.build_parser(name, module).format_help()
        assert f"cowhand {name} " in module.EXAMPLES
        assert module.EXAMPLES.strip() in text
        assert "--output" in text or name == "completion"

    @pytest.mark.parametrize("name", ["convert", "create", "resize", "map", "measure"])
    def test_help_tells_how_sizes_are_written_and_what_is_the_default(self, name: str) -> None:
        parser = main.build_parser(name, main.load(name))
        assert "Sizes are bytes" in parser.format_help()
        for action in vars(parser)["_actions"]:
            assert action.default in (None, False, [], "==SUPPRESS==") or str(action.default) in action.help

    def test_a_reader_that_leaves_is_no_error(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "cowhand", "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=surroundings(),
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.stderr is not None
            assert process.stderr.read() == b""
            assert process.wait(PATIENCE) in (0, 141)


class TestOutput:
    def test_tables_are_plain_lines_where_nobody_looks(self, capsys: pytest.CaptureFixture[str]) -> None:
        Output().table(("name", "size"), [("a", "1 GiB"), ("bbbbbb", "20 KiB")], right=(1,))
        assert capsys.readouterr().out == "name      size\na        1 GiB\nbbbbbb  20 KiB\n"

    def test_tables_are_drawn_on_terminals(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.delenv("NO_COLOR", raising=False)
        Output().table(("name", "size"), [("[red]a", "1 GiB")])
        text = capsys.readouterr().out
        assert "\x1b[" in text
        assert "[red]a" in text

    def test_facts_are_aligned(self, capsys: pytest.CaptureFixture[str]) -> None:
        Output().facts([("a", "1"), ("long name", "two\x1bx"), ("empty", "")])
        assert capsys.readouterr().out == "a:         1\nlong name: two\\x1bx\nempty:\n"

    def test_quiet_prints_no_lines_but_warnings(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = Output(quiet=True)
        out.line("x")
        out.note("y")
        out.warn("z")
        seen = capsys.readouterr()
        assert (seen.out, seen.err) == ("", "cowhand: warning: z\n")

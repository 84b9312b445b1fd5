"""On a real terminal: colour, the progress bar, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cowhand.cli.progress import Bar, Lines, duration, status
from cowhand.core.progress import Progress
from tests.cli.command import command_line, cowhand, surroundings
from tests.cli.images import MiB, image
from tests.tools.patience import PATIENCE

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")


class Terminal:
    """A command on a pseudo-terminal of 100 columns; what it shows is gathered by a thread."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        import fcntl
        import struct
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        environment = surroundings(TERM="xterm-256color")
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            command_line(*arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
        os.close(slave)
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:
                return
            if not data:
                return
            self._parts.append(data)

    @property
    def text(self) -> str:
        return b"".join(self._parts).decode()

    def wait_for(self, words: str) -> None:
        for _ in range(500):
            if words in self.text:
                return
            time.sleep(0.02)
        self.process.kill()
        self.end()
        raise AssertionError(f"{words!r} did not appear: {self.text!r}")

    def end(self) -> int:
        status = self.process.wait(PATIENCE)
        self._reader.join()
        os.close(self._master)
        return status


def test_results_are_coloured_and_fit(image_dir: Path) -> None:
    image(image_dir / "a")
    terminal = Terminal("map", "a", cwd=image_dir)
    assert terminal.end() == 0
    assert "\x1b[" in terminal.text and "never written" in terminal.text
    terminal = Terminal("info", "a", cwd=image_dir)
    assert terminal.end() == 0
    assert "\x1b[" in terminal.text and "cluster size" in terminal.text


def test_a_long_copy_shows_rate_and_time_left_and_stops_at_ctrl_c(image_dir: Path) -> None:
    source = image_dir / "disk.raw"
    source.write_bytes(bytes(range(1, 256)) * (32 * MiB // 255))
    before = source.read_bytes()
    terminal = Terminal("convert", "-r", "4M", "disk.raw", "copy.qcow2", cwd=image_dir)
    terminal.wait_for("left")
    assert "/s" in terminal.text and "disk.raw → copy.qcow2" in terminal.text
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert "safe point" in terminal.text and "Traceback" not in terminal.text
    assert "\x1b[?25h" in terminal.text, "the cursor stays hidden"
    assert [path.name for path in image_dir.iterdir()] == ["disk.raw"]
    assert source.read_bytes() == before


def test_a_bar_that_nobody_needs_is_not_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("copying")
    progress = Progress(100, bar)
    progress.advance(100)
    progress.finish()
    bar.close()
    assert capsys.readouterr().err == ""


def test_lines_come_once_for_each_tenth(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "INTERVAL", 0)
    progress = Progress(1000, Lines("copying"))
    for _ in range(100):
        progress.advance(10)
    progress.finish()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"copying: {tenth}0%" for tenth in range(1, 11)] + [
        "copying: 100%"
    ]
    assert " in 0 s" in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (61, "1:01 min"), (3600, "1:00 h"), (90000, "25:00 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_status_tells_amount_rate_and_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cowhand.core.clock.monotonic", lambda: now[0])
    progress = Progress(10 * MiB)
    now[0] = 102.0
    progress.advance(4 * MiB)
    assert status(progress) == "4 MiB of 10 MiB, 2 MiB/s, 3 s left"


def test_line_breaks_and_controls_in_names_are_escaped_in_errors_and_progress(tmp_path: Path) -> None:
    name = "a\n\x1b[31mb.raw"
    told = cowhand("info", name, cwd=tmp_path, status=1).stderr
    assert "\x1b" not in told and told.count("\n") == 1 and "a\\x0a\\x1b[31mb.raw" in told
    (tmp_path / name).write_bytes(bytes(4096))
    for words in (
        ("info", name),
        ("convert", "-p", name, f"{name}.copy"),
        ("check", name),
        ("du", name),
        ("locks", name),
    ):
        done = cowhand(*words, cwd=tmp_path, status=1 if words[0] == "check" else 0)
        assert "\x1b" not in done.stdout + done.stderr
        assert not any(line.startswith(("\x1b", "b.raw")) for line in (done.stdout + done.stderr).splitlines())

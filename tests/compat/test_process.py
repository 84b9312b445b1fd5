"""The tools as processes: their name, signals, streams that end, and what they import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.patience import PATIENCE
from tests.tools.programs import find
from tests.tools.qemu import require_qemu

HEAVY = ("numpy", "rich", "asyncio", "cryptography", "cowhand.copy", "cowhand.image.create")


def script(folder: Path, name: str, module: str) -> Path:
    """Write a starter of *module* called *name*."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
    path.chmod(0o755)
    return path


def run(*words: str | Path, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    # Unbuffered output, which some environments ask of Python, would show what an abort has to lose.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [*map(os.fspath, words)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env=environment,
    )


@pytest.mark.usefixtures("as_7_2")
def test_messages_begin_with_the_name_it_was_started_by(tmp_path: Path) -> None:
    tool = script(tmp_path, "my-img", "cowhand.cli.compat.img")
    done = run(tool, cwd=tmp_path)
    assert done.stderr == b"my-img: Not enough arguments\nTry 'my-img --help' for more information\n"
    assert done.returncode == 1


@pytest.mark.usefixtures("as_7_2")
@pytest.mark.parametrize(("module", "name"), [("img", "cowhand-img"), ("io", "cowhand-io")])
def test_started_as_a_module_it_has_its_own_name(tmp_path: Path, module: str, name: str) -> None:
    done = run(sys.executable, "-m", f"cowhand.cli.compat.{module}", "--version", cwd=tmp_path)
    assert done.stdout.startswith(f"{name} version 7.2".encode())


def test_info_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(65536))
    code = (
        "import sys; from cowhand.cli.compat.img import main; status = main(['qemu-img', 'info', 'disk']);"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"[]\n")


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    tool = script(tmp_path, "qemu-img", "cowhand.cli.compat.img")
    with subprocess.Popen([tool, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(PATIENCE)


def test_raising_a_signal_prints_first_and_aborting_does_not(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(65536))
    tool = script(tmp_path, "qemu-io", "cowhand.cli.compat.io")
    killed = run(tool, "-f", "raw", "-c", "length", "-c", "sigraise 9", "disk", cwd=tmp_path)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, b"64 KiB\n")
    aborted = run(tool, "-f", "raw", "-c", "length", "-c", "abort", "disk", cwd=tmp_path)
    assert (aborted.returncode, aborted.stdout) == (-signal.SIGABRT, b"")


@pytest.mark.interop
@require_qemu
@pytest.mark.parametrize("commands", [["length", "sigraise 15"], ["length", "sigraise 0"], ["length", "abort"]])
def test_both_tools_end_alike(tmp_path: Path, commands: list[str]) -> None:
    (tmp_path / "disk").write_bytes(bytes(65536))
    own = script(tmp_path, "qemu-io", "cowhand.cli.compat.io")
    words = [word for command in commands for word in ("-c", command)]
    real = run(find("qemu-io") or "", "-f", "raw", *words, "disk", cwd=tmp_path)
    found = run(own, "-f", "raw", *words, "disk", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (real.returncode, real.stdout)


def test_sigusr1_asks_for_progress_once(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * (4 << 20))
    tool = script(tmp_path, "qemu-img", "cowhand.cli.compat.img")
    command = [tool, "convert", "-f", "raw", "-O", "raw", "-r", "2M", "disk", "copy"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stderr is not None
        try:
            # Its handler is there as soon as it writes.
            _until_written(tmp_path, process)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
        lines = process.stderr.read().decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("    (") and lines[0].endswith("/100%)")


def _until_written(folder: Path, process: subprocess.Popen[bytes]) -> None:
    import time

    last = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < last:
        if any(path.name not in ("disk", "qemu-img") and path.stat().st_size for path in folder.iterdir()):
            return
        time.sleep(0.02)
    raise AssertionError("nothing was written")


def test_names_are_printed_as_they_are_stored_whatever_the_encoding(tmp_path: Path) -> None:
    name = os.fsdecode("bücher".encode() + b"\xff")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cowhand.cli.compat.img", "create", name, "1M"],
        cwd=tmp_path, capture_output=True, timeout=PATIENCE, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout == b"Formatting '" + os.fsencode(name) + b"', fmt=raw size=1048576\n"

"""The I/O tool without QEMU beside it: requests in the background, breakpoints, its two ways of taking commands."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cowhand.cli.compat.io.background import Background
from cowhand.cli.compat.io.parsing import Complaint, c_integer, lengths, pattern
from cowhand.cli.compat.io.table import COMMANDS, EXTENDED
from tests.compat.sides import Outcome, run_own
from tests.tools.patience import PATIENCE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with an empty raw and an empty qcow2 image of 1 MiB."""
    path = tmp_path / "images"
    path.mkdir()
    (path / "disk.raw").write_bytes(bytes(1 << 20))
    run_own(["qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "1M"], path)
    return path


def io(folder: Path, image: str, *commands: str, stdin: str = "") -> Outcome:
    words = [word for command in commands for word in ("-c", command)]
    options = ["-f", "raw"] if image.endswith(".raw") else []
    return run_own(["qemu-io", *options, *words, image], folder, stdin)


def test_every_command_can_be_loaded_and_is_described() -> None:
    for command in COMMANDS:
        assert callable(command.load())
    assert set(EXTENDED) <= {command.name for command in COMMANDS}


def test_a_pattern_is_written_and_verified(folder: Path) -> None:
    outcome = io(folder, "disk.raw", "write -P 7 1k 2k", "read -P 7 1k 2k", "read -P 8 -s 512 -l 512 1k 2k")
    assert outcome == Outcome(
        1,
        "wrote 2048/2048 bytes at offset 1024\n2 KiB, OPERATIONS\n"
        "read 2048/2048 bytes at offset 1024\n2 KiB, OPERATIONS\n"
        "Pattern verification failed at offset 1536, 512 bytes\n"
        "read 2048/2048 bytes at offset 1024\n2 KiB, OPERATIONS\n",
        "",
    )


def test_a_failed_command_does_not_stop_the_others(folder: Path) -> None:
    outcome = io(folder, "disk.raw", "nothing", "length")
    assert outcome == Outcome(1, "1 MiB\n", 'command "nothing" not found\n')


def test_commands_come_from_standard_input(folder: Path) -> None:
    assert io(folder, "disk.raw", stdin="length\n\nread -q 0 1k\nquit\nlength\n") == Outcome(
        0, "qemu-io> 1 MiB\nqemu-io> qemu-io> qemu-io> ", ""
    )


def test_background_requests_show_their_results_when_they_are_waited_for(folder: Path) -> None:
    outcome = io(folder, "disk.raw", "aio_write -q -P 3 0 64k", "aio_flush", "aio_read -P 3 0 1k", "length")
    assert outcome.status == 0
    assert outcome.out == "1 MiB\nread 1024/1024 bytes at offset 0\n1 KiB, OPERATIONS\n"


def test_a_failed_background_request_is_shown_and_no_failure(folder: Path) -> None:
    assert io(folder, "disk.raw", "aio_write 2M 1k") == Outcome(0, "aio_write failed: Input/output error\n", "")


def test_a_suspended_write_lets_others_pass_and_goes_on(folder: Path) -> None:
    commands = ["break write_aio A", "aio_write -q -P 1 0 64k", "wait_break A", "write -q -P 2 64k 64k"]
    commands += ["resume A", "aio_flush", "read -q -P 1 0 64k", "read -q -P 2 64k 64k"]
    outcome = io(folder, "blkdebug::disk.qcow2", *commands)
    assert outcome == Outcome(0, "blkdebug: Suspended request 'A'\nblkdebug: Resuming request 'A'\n", "")


def test_a_temporary_overlay_keeps_writes_from_the_image(folder: Path) -> None:
    written = run_own(
        ["qemu-io", "-s", "-f", "raw", "-c", "write -q 0 64k", "-c", "read -q -P 0xcd 0 64k", "disk.raw"], folder
    )
    assert written == Outcome(0, "", "")
    assert io(folder, "disk.raw", "read -q -P 0 0 64k") == Outcome(0, "", "")


def test_reopening_changes_what_may_be_done(folder: Path) -> None:
    outcome = io(folder, "disk.raw", "reopen -r", "write -q 0 1k", "reopen -w", "write -q 0 1k")
    assert outcome == Outcome(1, "", "qemu-io: Block node is read-only\n")


def test_a_background_wait_sees_every_result() -> None:
    # The end of a request and the look for it may fall together in any order.
    shown: list[int] = []
    background = Background()

    def work(number: int) -> Callable[[], Callable[[], None]]:
        return lambda: lambda: shown.append(number)

    for number in range(300):
        background.start(work(number))
    background.wait()
    assert sorted(shown) == list(range(300))
    assert not background.busy


def test_a_held_up_request_does_not_hold_up_the_next() -> None:
    background = Background()
    gate = threading.Event()

    def waits() -> Callable[[], None]:
        gate.wait(PATIENCE)
        return lambda: None

    background.start(waits)
    background.start(lambda: gate.set)
    background.show()
    background.wait()
    assert not background.busy


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("0x1f", 31), ("010", 8), ("-7", -7), ("+7", 7), ("08", None), ("1x", None), ("", None)],
)
def test_integers_of_c(text: str, value: int | None) -> None:
    assert c_integer(text) == value


@pytest.mark.parametrize("text", ["256", "-1", "a", "0x100"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(Complaint, match="is not a valid pattern byte"):
        pattern(text)


def test_lengths_have_a_common_limit() -> None:
    assert lengths(["1k", "512"]) == [1024, 512]
    with pytest.raises(Complaint, match="The total number of bytes exceed"):
        lengths(["1G", "1G"])

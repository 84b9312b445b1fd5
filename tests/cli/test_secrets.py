"""Encrypted images on the command line: passphrases come from files and from the terminal, and are never shown."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

import cowhand as cowhand_library
from cowhand.image.snapshots import create_snapshot, open_snapshot
from tests.cli.command import command_line, cowhand, surroundings
from tests.tools.patience import PATIENCE

QUICK = "encrypt.iter-time=1"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    one, two = tmp_path / "one.key", tmp_path / "two.key"
    one.write_bytes(b"first passphrase")
    two.write_bytes(b"second passphrase")
    return one, two


@pytest.fixture
def image(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    path = tmp_path / "disk.qcow2"
    cowhand("create", "--encrypt", "--key-file", keys[0], "-f", "qcow2", "-o", QUICK, path, "1M")
    return path


def test_info_tells_how_it_is_encrypted_without_a_passphrase(image: Path) -> None:
    done = cowhand("info", image)
    assert "encrypted:    LUKS, aes-256-xts-plain64, sha256; key slot 0\n" in done.stdout


def test_what_needs_a_passphrase_says_how_to_give_it(image: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    done = cowhand("convert", "-O", "raw", image, tmp_path / "x.raw", status=1)
    assert "--secret" in done.stderr
    assert "--key-file" in done.stderr
    wrong = cowhand("checksum", "--key-file", keys[1], image, status=1)
    assert "opens none of the key slots" in wrong.stderr
    assert "second passphrase" not in wrong.stderr


def test_a_copy_with_a_passphrase_of_its_own(image: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    one, two = keys
    copy = tmp_path / "copy.qcow2"
    cowhand("convert", "--key-file", one, "--encrypt", "--target-key-file", two, "-o", QUICK, image, copy)
    cowhand("checksum", "--key-file", one, copy, status=1)
    cowhand("compare", "--key-file", one, "--key-file", two, image, copy)
    cowhand("convert", "--key-file", one, "--encrypt", "-o", QUICK, image, tmp_path / "same.qcow2")
    cowhand("checksum", "--key-file", one, tmp_path / "same.qcow2")


def test_only_what_can_be_encrypted_is(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    done = cowhand("create", "--encrypt", "--key-file", keys[0], "-f", "raw", tmp_path / "x.raw", "1M", status=1)
    assert "not encrypted" in done.stderr
    luks = tmp_path / "x.luks"
    cowhand("create", "--key-file", keys[0], "-f", "luks", "-o", "iter-time=1", luks, "1M")
    cowhand("checksum", "--key-file", keys[0], "-f", "luks", luks)


def test_jobs_on_encrypted_chains(image: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    key = ("--key-file", keys[0])
    opened = {"encrypt.key-secret": "s", "backing.encrypt.key-secret": "s"}
    top, copy, data = tmp_path / "top.qcow2", tmp_path / "copy.qcow2", os.urandom(70000)
    held = {"s": keys[0].read_bytes()}
    with cowhand_library.open(image, writable=True, options={"encrypt.key-secret": "s"}, secrets=held) as disk:
        disk.write(1000, data)
        create_snapshot(disk, "then")
        disk.write(500000, data)
    cowhand("convert", *key, "--snapshots", "--encrypt", "-o", QUICK, image, copy)
    cowhand("create", "--encrypt", *key, "-f", "qcow2", "-o", QUICK, "-b", image, "-F", "qcow2", top)
    with cowhand_library.open(top, writable=True, options=opened, secrets=held) as disk:
        disk.write(200000, data)
    cowhand("rebase", *key, "-b", copy, "-F", "qcow2", top)
    cowhand("commit", *key, top)
    with cowhand_library.open(copy, options={"encrypt.key-secret": "s"}, secrets=held) as disk:
        found = disk.read(0, disk.size)
        with open_snapshot(disk, "then") as view:
            assert view.read(1000, 70000) == data
            assert not any(view.read(500000, 70000))
    assert found[1000:71000] == found[200000:270000] == found[500000:570000] == data


def test_a_copy_in_the_clear_is_told_of(image: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    done = cowhand("convert", "--key-file", keys[0], "-O", "raw", image, tmp_path / "x.raw")
    assert "is encrypted, and the copy is not" in done.stderr


def test_without_a_terminal_nothing_is_asked(image: Path) -> None:
    process = subprocess.run(
        command_line("checksum", "--secret", image),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,  # without a terminal that could be asked
        env=surroundings(),
        check=False,
    )
    assert process.returncode == 1
    assert "no terminal to ask" in process.stderr


def test_the_terminal_is_asked_and_shows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    shown = at_a_terminal(
        ("create", "--encrypt", "-f", "qcow2", "-o", QUICK, path, "1M"),
        [("New passphrase: ", "open sesame\n"), ("Once more: ", "open sesame\n")],
    )
    assert "created" in shown
    assert "sesame" not in shown
    assert "opens none" in at_a_terminal(("checksum", "--secret", path), [("Passphrase: ", "abracadabra\n")])
    shown = at_a_terminal(("checksum", "--secret", path), [("Passphrase: ", "open sesame\n")])
    assert str(path) in shown
    assert "differ" in at_a_terminal(
        ("create", "--encrypt", "-f", "qcow2", tmp_path / "no.qcow2", "1M"),
        [("New passphrase: ", "one\n"), ("Once more: ", "two\n")],
    )
    assert not (tmp_path / "no.qcow2").exists()


def at_a_terminal(arguments: tuple[str | Path, ...], talk: list[tuple[str, str]]) -> str:
    """Run cowhand at a terminal of its own; type each answer after its question. Returns what the terminal showed."""
    child, terminal = pty.fork()
    if not child:
        line = command_line(*arguments)
        os.execvpe(line[0], line, surroundings())
    shown, pending, limit = "", list(talk), time.monotonic() + PATIENCE
    try:
        while time.monotonic() < limit:
            if not select.select([terminal], [], [], 0.5)[0]:
                continue
            try:
                piece = os.read(terminal, 4096).decode(errors="replace")
            except OSError:
                break  # it has ended
            shown += piece
            if pending and shown.endswith(pending[0][0]):
                time.sleep(0.05)  # until echoing is off
                os.write(terminal, pending.pop(0)[1].encode())
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    assert not pending, shown
    return shown

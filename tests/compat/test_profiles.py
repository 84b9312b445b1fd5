"""Later versions' command lines, text and JSON, by ``--compat`` or the environment; 7.2's stay what they are without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cowhand.cli.compat import img as image_tool, profiles
from cowhand.cli.compat.img.longnames import LATER_LETTERS, LONG_NAMES
from tests.compat.sides import Outcome, run_own

pytestmark = pytest.mark.usefixtures("as_7_2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with an image that holds data, compressed data, and zeroes."""
    path = tmp_path / "images"
    path.mkdir()
    run(path, "create", "-q", "-f", "qcow2", "a.qcow2", "256k")
    run_own(["qemu-io", "-c", "write 0 64k", "-c", "write -c 64k 64k", "a.qcow2"], path)
    return path


def run(folder: Path, *words: str, compat: str | None = None) -> Outcome:
    return run_own(["qemu-img", *(["--compat", compat] if compat else []), *words], folder)


def test_a_map_tells_of_compression_since_8_2(folder: Path) -> None:
    old = json.loads(run(folder, "map", "--output=json", "a.qcow2").out)
    new = json.loads(run(folder, "map", "--output=json", "a.qcow2", compat="8.2").out)
    assert [row.pop("compressed") for row in new] == [False, True, False]
    assert new == old


def test_info_tells_of_children_since_8_2(folder: Path) -> None:
    old = json.loads(run(folder, "info", "--output=json", "a.qcow2").out.replace(": N", ": 0"))
    new = json.loads(run(folder, "info", "--output=json", "a.qcow2", compat="8.2").out.replace(": N", ": 0"))
    (child,) = new.pop("children")
    assert new == old
    assert child["name"] == "file"
    assert child["info"]["format"] == "file"
    assert child["info"]["children"] == []
    assert child["info"]["format-specific"] == {"type": "file", "data": {}}
    text = run(folder, "info", "a.qcow2", compat="8.2").out
    assert "Child node '/file':\n    filename: a.qcow2\n    protocol type: file\n    file length: N" in text
    assert text.startswith(run(folder, "info", "a.qcow2").out)


def test_limits_of_requests_are_told_where_they_are_asked_for(folder: Path) -> None:
    found = json.loads(
        run(folder, "info", "--limits", "--output=json", "a.qcow2", compat="10.2").out.replace(": N", ": 0")
    )
    assert found["limits"]["request-alignment"] == 1
    assert found["limits"]["write-zeroes-alignment"] == 65536
    assert "request-alignment" in found["children"][0]["info"]["limits"]
    text = run(folder, "info", "--limits", "a.qcow2", compat="10.2").out
    assert "\nBlock limits:\n" in text
    assert "    write zeroes alignment: 65536\n" in text
    assert "limits" not in run(folder, "info", "a.qcow2", compat="10.2").out


def test_a_snapshot_list_needs_no_option_since_10_1(folder: Path) -> None:
    assert run(folder, "snapshot", "-c", "one", "a.qcow2").status == 0
    assert run(folder, "snapshot", "a.qcow2") == Outcome(0, "", "")
    listed = run(folder, "snapshot", "a.qcow2", compat="10.1")
    assert listed == run(folder, "snapshot", "-l", "a.qcow2", compat="10.1")
    assert "one" in listed.out
    assert run(folder, "snapshot", "-f", "qcow2", "a.qcow2", compat="10.1") == listed
    assert run(folder, "snapshot", "-f", "qcow2", "a.qcow2").status == 1


def test_a_hint_names_the_command_since_10_1(folder: Path) -> None:
    assert run(folder, "create", compat="10.1").err == (
        "qemu-img: Expecting image file name\nTry 'qemu-img create --help' for more information\n"
    )
    assert run(folder, "create", "--foo", compat="10.1").err == (
        "qemu-img create: unrecognized option '--foo'\nTry 'qemu-img create --help' for more information\n"
    )
    assert (
        run(folder, "create").err == "qemu-img: Expecting image file name\nTry 'qemu-img --help' for more information\n"
    )


@pytest.mark.parametrize("command", image_tool.COMMANDS)
def test_every_command_has_a_help_of_its_own_since_10_1(folder: Path, command: str) -> None:
    outcome = run(folder, command, "--help", compat="10.2")
    assert outcome.status == 0
    assert outcome.out.startswith(f"usage: qemu-img {command} ")
    for name in LONG_NAMES[command]:
        if name in ("format", "options", "cache"):
            assert f"--{name}" in outcome.out
    assert "see the manual" not in outcome.out


def test_long_names_do_what_the_letters_do(folder: Path) -> None:
    run(folder, "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "x.qcow2")
    run(folder, "create", "--quiet", "--format", "qcow2", "--backing=a.qcow2", "--backing-format", "qcow2", "y.qcow2")
    assert (folder / "x.qcow2").read_bytes() == (folder / "y.qcow2").read_bytes()
    short = run(folder, "convert", "-O", "qcow2", "-c", "-m", "2", "a.qcow2", "c.qcow2")
    long = run(folder, "convert", "--target-format", "qcow2", "--compress", "--parallel=2", "a.qcow2", "d.qcow2")
    assert short == long == Outcome(0, "", "")
    assert (folder / "c.qcow2").read_bytes() == (folder / "d.qcow2").read_bytes()
    assert run(folder, "compare", "--strict", "--a-format=qcow2", "--b-format=qcow2", "x.qcow2", "y.qcow2").status == 0
    assert run(folder, "commit", "--drop", "--quiet", "x.qcow2") == Outcome(0, "", "")
    assert run(folder, "rebase", "--backing-unsafe", "--backing", "", "x.qcow2").status == 0
    assert "backing file" not in run(folder, "info", "x.qcow2").out


def test_letters_that_changed_are_new_ones_only_where_asked_for(folder: Path) -> None:
    words = ("-b", "a.qcow2", "-F", "qcow2", "-O", "qcow2", "a.qcow2", "n.qcow2")
    assert run(folder, "convert", *words).status == 1
    assert run(folder, "convert", *words, compat="10.1").status == 0
    assert "backing file: a.qcow2" in run(folder, "info", "n.qcow2").out
    assert set(LATER_LETTERS) <= set(image_tool.COMMANDS)


def test_an_abbreviation_still_means_what_it_meant(folder: Path) -> None:
    assert run(folder, "info", "--outp=json", "a.qcow2").status == 0
    assert run(folder, "map", "--start=0", "--max=64k", "a.qcow2").status == 0
    assert run(folder, "dd", "--outp=raw", "if=a.qcow2", "of=n").status == 1
    assert run(folder, "dd", "--outp=raw", "if=a.qcow2", "of=n", compat="10.1").status == 0
    assert "unrecognized option '--o=json'" in run(folder, "info", "--o=json", "a.qcow2").err


@pytest.mark.parametrize(
    ("version", "profile"),
    [
        ("7.2", "7.2"), ("7.2.22", "7.2"), ("8.0", "7.2"), ("8.2", "8.2"), ("9.0", "8.2"), ("9.2", "9.2"), ("10.0.13", "10.0"),
        ("10", "10.0"), ("10.1", "10.1"), ("10.2", "10.2"), ("10.9", "10.2"), ("11", "11"), ("11.0", "11"), ("11.1.3", "11"),
    ],
)  # fmt: skip
def test_a_release_has_the_profile_that_is_not_newer(version: str, profile: str) -> None:
    assert profiles.profile_of(version) == profile


@pytest.mark.parametrize("version", ["", "7.1", "12.0", "banana", "10.", "-1", "10.0 ", "99999999999.1", "1" * 5000])
def test_what_no_profile_is_of(version: str) -> None:
    with pytest.raises(profiles.UnknownVersion):
        profiles.profile_of(version)


def test_a_whole_release_is_named_as_it_was_asked_for(folder: Path) -> None:
    assert run(folder, "--version", compat="10.0.2").out.startswith("qemu-img version 10.0.2 (cowhand ")
    assert run(folder, "--version", compat="11").out.startswith("qemu-img version 11.")


def test_the_newest_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(profiles.VARIABLE)
    monkeypatch.setattr(profiles, "configuration_files", lambda: [tmp_path / "config.toml"])
    assert run(folder, "--version").out.startswith(f"qemu-img version {profiles.NEWEST}.")


def test_a_configuration_file_chooses_where_nothing_else_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    system = tmp_path / "etc.toml"
    monkeypatch.setattr(profiles, "_SYSTEM_FILE", system)
    monkeypatch.delenv(profiles.VARIABLE)
    system.write_text('[qemu]\ncompat = "8.2"\n')
    assert run(folder, "--version").out.startswith("qemu-img version 8.2")
    own = tmp_path / "cowhand" / "config.toml"
    own.parent.mkdir()
    own.write_text("[other]\nx = 1\n")
    assert run(folder, "--version").out.startswith("qemu-img version 8.2")
    own.write_text('[qemu]\ncompat = "9.2"\n')
    assert run(folder, "--version").out.startswith("qemu-img version 9.2")
    assert run_own(["qemu-io", "--version"], folder).out.startswith("qemu-io version 9.2")
    monkeypatch.setenv(profiles.VARIABLE, "10.0")
    assert run(folder, "--version").out.startswith("qemu-img version 10.0")
    assert run(folder, "--version", compat="7.2").out.startswith("qemu-img version 7.2")


@pytest.mark.parametrize(
    "text", ["[qemu\n", "[qemu]\ncompat = 7.2\n", "qemu = 3\n", '[qemu]\ncompat = "6.0"\n', "\xff"]
)
def test_a_wrong_configuration_file_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(profiles, "configuration_files", lambda: [path])
    monkeypatch.delenv(profiles.VARIABLE)
    outcome = run(folder, "info", "a.qcow2")
    assert (outcome.status, outcome.out) == (1, "")
    assert str(path) in outcome.err or "6.0" in outcome.err
    assert run(folder, "info", "a.qcow2", compat="7.2").status == 0


def test_the_io_tool_takes_the_version_too(folder: Path) -> None:
    plain = run_own(["qemu-io", "--compat", "7.2", "-c", "help read", "a.qcow2"], folder).out
    later = run_own(["qemu-io", "--compat=10.0", "-c", "help read", "a.qcow2"], folder).out
    assert "[-abCqv]" in plain
    assert "[-abCqrv]" in later
    assert run_own(["qemu-io", "--compat=11", "--version"], folder).out.startswith("qemu-io version 11")


def test_the_environment_chooses_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWHAND_COMPAT", "10.2")
    assert run(folder, "--version").out.startswith("qemu-img version 10.2")
    assert "Child node" in run(folder, "info", "a.qcow2").out
    assert "Child node" not in run(folder, "info", "a.qcow2", compat="7.2").out
    monkeypatch.setenv("COWHAND_COMPAT", "banana")
    outcome = run(folder, "info", "a.qcow2")
    assert (outcome.status, outcome.err.count("banana")) == (1, 1)

"""The image tool without QEMU beside it: its help, its name, what a chain, a map and a failure look like."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowhand.drivers import REGISTRY
from tests.compat.sides import Outcome, run_own

# What is here compares with no tool.
pytestmark = pytest.mark.usefixtures("as_7_2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder in which the tool is run."""
    path = tmp_path / "images"
    path.mkdir()
    return path


def run(folder: Path, *words: str, stdin: str = "") -> Outcome:
    return run_own(list(words), folder, stdin)


def img(folder: Path, *words: str) -> Outcome:
    return run(folder, "qemu-img", *words)


def test_help_lists_commands_and_formats_under_the_name_it_was_started_by(folder: Path) -> None:
    outcome = img(folder, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith("qemu-img version 7.2")
    assert "usage: qemu-img [standard options] command" in outcome.out
    formats = outcome.out.rsplit("Supported formats: ", 1)[1].split()
    assert {"raw", "qcow2", "file"} <= set(formats) <= {entry.name for entry in REGISTRY}


@pytest.mark.parametrize("command", ["create", "info", "convert", "resize", "check"])
def test_every_command_shows_the_same_help(folder: Path, command: str) -> None:
    assert img(folder, command, "-h", "x") == img(folder, "--help")


def test_version_names_both(folder: Path) -> None:
    outcome = img(folder, "-V")
    assert outcome.status == 0
    assert outcome.out.splitlines()[0].startswith("qemu-img version 7.2.22 (cowhand ")


def test_info_tells_of_a_chain(folder: Path) -> None:
    img(folder, "create", "-q", "-f", "raw", "base.raw", "1M")
    img(folder, "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2")
    assert img(folder, "info", "--backing-chain", "top.qcow2") == Outcome(
        0,
        """\
image: top.qcow2
file format: qcow2
virtual size: 1 MiB (1048576 bytes)
disk size: N
cluster_size: 65536
backing file: base.raw
backing file format: raw
Format specific information:
    compat: 1.1
    compression type: zlib
    lazy refcounts: false
    refcount bits: 16
    corrupt: false
    extended l2: false

image: base.raw
file format: raw
virtual size: 1 MiB (1048576 bytes)
disk size: N
""",
        "",
    )


def test_info_ends_at_a_loop(folder: Path) -> None:
    for name, below in (("a", "b"), ("b", "a")):
        img(folder, "create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", "qcow2", name, "1M")
    outcome = img(folder, "info", "--backing-chain", "a")
    assert outcome == Outcome(1, "", "qemu-img: Backing file 'a' creates an infinite loop.\n")


def test_a_missing_base_is_named_with_its_way(folder: Path) -> None:
    img(folder, "create", "-q", "-f", "qcow2", "-u", "-b", "nowhere", "-F", "raw", "top.qcow2", "1M")
    assert img(folder, "map", "top.qcow2") == Outcome(
        1,
        "",
        "qemu-img: Could not open 'top.qcow2': Could not open backing file: "
        "Could not open 'nowhere': No such file or directory\n",
    )


def test_convert_never_takes_its_source_for_its_target(folder: Path) -> None:
    (folder / "disk.raw").write_bytes(b"x" * 65536)
    for words in (["-O", "raw"], ["-n", "-O", "raw"]):
        outcome = img(folder, "convert", "-f", "raw", *words, "disk.raw", "disk.raw")
        assert outcome.status == 1
        assert 'Failed to get "write" lock\nIs another process using the image [disk.raw]?' in outcome.err
        assert (folder / "disk.raw").read_bytes() == b"x" * 65536


def test_progress_ends_at_all_of_it(folder: Path) -> None:
    (folder / "disk.raw").write_bytes(b"x" * 65536)
    outcome = img(folder, "convert", "-p", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2")
    assert outcome.status == 0
    assert outcome.out.startswith("    (0.00/100%)\r")
    assert outcome.out.endswith("    (100.00/100%)\r\n")


def test_quiet_silences_progress(folder: Path) -> None:
    (folder / "disk.raw").write_bytes(b"x" * 65536)
    assert img(folder, "convert", "-pq", "-f", "raw", "disk.raw", "copy.raw") == Outcome(0, "", "")


def test_create_writes_over_an_existing_image(folder: Path) -> None:
    (folder / "disk.qcow2").write_bytes(b"x" * 1000000)
    assert img(folder, "create", "-q", "-f", "qcow2", "disk.qcow2", "1M") == Outcome(0, "", "")
    assert img(folder, "check", "disk.qcow2").status == 0


def test_a_failed_create_leaves_no_file(folder: Path) -> None:
    assert img(folder, "create", "-q", "-f", "qcow2", "-o", "cluster_size=3", "x", "1M").status == 1
    assert list(folder.iterdir()) == []

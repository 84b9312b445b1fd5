"""``cowhand checksum``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cowhand.cli.commands.checksum import parse
from cowhand.core.errors import InvalidArgument
from tests.cli.command import cowhand
from tests.cli.images import MiB, fill, image
from tests.tools.programs import require, run


@pytest.fixture
def folder(image_dir: Path) -> Path:
    image(image_dir / "a")
    fill(image_dir / "a", 0, MiB, 1)
    cowhand("convert", "-O", "raw", "a", "b.raw", cwd=image_dir)
    return image_dir


def test_lines_are_those_of_sha256sum(folder: Path) -> None:
    digest = hashlib.sha256((folder / "b.raw").read_bytes()).hexdigest()
    found = cowhand("checksum", "a", "b.raw", cwd=folder)
    assert found.stdout == f"{digest}  a\n{digest}  b.raw\n"
    assert cowhand("checksum", "--tag", "a", cwd=folder).stdout == f"SHA256 (a) = {digest}\n"
    document = cowhand("checksum", "--output", "json", "a", cwd=folder).json()
    assert document == [{"filename": "a", "algorithm": "sha256", "digest": digest, "virtual-size": 8 * MiB}]


@require("sha256sum")
@pytest.mark.parametrize("flags", [(), ("--tag",)])
def test_sha256sum_verifies_them_and_the_other_way_round(folder: Path, flags: tuple[str, ...]) -> None:
    name = "odd \\ name\nof two lines.raw"
    os.rename(folder / "b.raw", folder / name)
    (folder / "SUMS").write_text(cowhand("checksum", *flags, name, cwd=folder).stdout)
    assert run("sha256sum", "--check", "SUMS", cwd=folder).status == 0
    (folder / "THEIRS").write_text(run("sha256sum", *flags, name, cwd=folder).stdout)
    assert (folder / "THEIRS").read_text() == (folder / "SUMS").read_text()
    assert cowhand("checksum", "--check", "THEIRS", cwd=folder).stdout.endswith(": OK\n")


def test_verify(folder: Path) -> None:
    (folder / "SUMS").write_text(
        cowhand("checksum", "-a", "tree-sha256", "a", cwd=folder).stdout
        + "\n# a comment\n"
        + cowhand("checksum", "-a", "sha512", "b.raw", cwd=folder).stdout
    )
    assert cowhand("checksum", "--check", "SUMS", cwd=folder).stdout == "a: OK\nb.raw: OK\n"
    fill(folder / "a", 2 * MiB, 512, 7)
    told = cowhand("checksum", "--check", "SUMS", cwd=folder, status=6)
    assert told.stdout == "a: FAILED\nb.raw: OK\n" and "1 of 2 did not match" in told.stderr
    (folder / "b.raw").unlink()
    document = cowhand("checksum", "--check", "SUMS", "--output", "json", cwd=folder, status=6).json()
    assert [(one["ok"], one["problem"] is None) for one in document] == [(False, True), (False, False)]
    fill(folder / "a", 2 * MiB, 512, 0)
    assert cowhand("checksum", "--check", "SUMS", cwd=folder, status=1).stdout.startswith("a: OK\nb.raw: FAILED: ")


def test_refusals(folder: Path) -> None:
    (folder / "BAD").write_text("nonsense\n")
    (folder / "EMPTY").write_text("")
    for words, message in (
        (("-a", "crc", "a"), "'crc' is not a checksum algorithm"),
        (("--check", "BAD"), "line 1 is not a checksum"),
        (("--check", "EMPTY"), "no checksums"),
        (("--check", "none"), "No such file"),
    ):
        assert message in cowhand("checksum", *words, cwd=folder, status=1).stderr
    assert "99 threads" in cowhand("checksum", "-m", "99", "a", cwd=folder, status=2).stderr
    for words in ((), ("a", "--check", "x")):
        assert "either images or --check" in cowhand("checksum", *words, cwd=folder, status=2).stderr


def test_lines_of_other_lengths() -> None:
    assert [line.algorithm for line in parse(f"{'0' * 32}  a\n{'A' * 128} *b\r\n", None)] == ["md5", "sha512"]
    assert parse(f"{'0' * 64}  a", "sha3_256")[0].algorithm == "sha3_256"
    assert parse(f"\\{'0' * 64}  a\\nb\\\\n", None)[0].name == "a\nb\\n"
    with pytest.raises(InvalidArgument):
        parse("SHA256 a = 00", None)

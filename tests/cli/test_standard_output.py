"""Output that is data is not talk: an image on standard output, lists of checksums, and the names in them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import cowhand
from tests.tools.patience import PATIENCE

MIB = 1 << 20


def run(line: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run *line* in a shell where ``cowhand`` is the one under test."""
    shell = f'cowhand() {{ "{sys.executable}" -m cowhand "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, timeout=PATIENCE)


@pytest.fixture
def source(image_dir: Path, rng: random.Random) -> bytes:
    content = rng.randbytes(MIB) + bytes(2 * MIB) + rng.randbytes(MIB) + bytes(MIB)
    (image_dir / "s.raw").write_bytes(content)
    cowhand("convert", "-q", "s.raw", "s.qcow2", cwd=image_dir)
    return content


@pytest.mark.parametrize("target", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize(
    "how", ["convert -O raw s.qcow2 {}", "convert --overwrite -p s.qcow2 {}", "dd if=s.qcow2 of={}"]
)
def test_an_image_on_standard_output_is_nothing_but_the_image(
    image_dir: Path, source: bytes, target: str, how: str
) -> None:
    line = f"cowhand {how.format(target)}"
    piped = run(f"{line} | cat", image_dir)
    assert piped.stdout == source
    assert b"copied" in piped.stderr
    done = run(f"{line} > out", image_dir)
    assert done.returncode == 0, done.stderr
    assert (image_dir / "out").read_bytes() == source


def test_what_was_written_before_stays_before(image_dir: Path, source: bytes) -> None:
    run("{ echo head; cowhand convert -q s.qcow2 -; echo tail; } > out", image_dir)
    assert (image_dir / "out").read_bytes() == b"head\n" + source + b"tail\n"
    run("cowhand convert -q s.qcow2 - >> out", image_dir)
    assert (image_dir / "out").read_bytes().endswith(b"tail\n" + source)


def test_zeroes_become_holes_in_a_file(image_dir: Path, source: bytes) -> None:
    run("cowhand convert -q s.qcow2 - > out", image_dir)
    assert (image_dir / "out").stat().st_blocks * 512 < len(source) - MIB


def test_a_part_goes_to_a_pipe(image_dir: Path, source: bytes) -> None:
    os.mkfifo(image_dir / "pipe")
    done = run("cowhand dd -q if=s.qcow2 of=pipe bs=1M skip=3 count=4 & cat pipe; wait", image_dir)
    assert done.stdout == source[3 * MIB : 4 * MIB]


def test_json_goes_to_standard_error_then(image_dir: Path, source: bytes) -> None:
    done = run("cowhand convert --output json s.qcow2 -", image_dir)
    assert done.stdout == source
    assert json.loads(done.stderr)["virtual-size"] == len(source)


@pytest.mark.parametrize(
    ("option", "status"), [("-O qcow2", 1), ("-c", 2), ("--verify", 2), ("-n", 2), ("-o size=1M", 2)]
)
def test_what_is_no_stream_is_refused_and_nothing_is_written(
    image_dir: Path, source: bytes, option: str, status: int
) -> None:
    done = run(f"cowhand convert --overwrite {option} s.qcow2 /dev/stdout > out", image_dir)
    assert done.returncode == status
    assert (image_dir / "out").read_bytes() == b""


def test_a_reader_that_goes_ends_it(image_dir: Path, source: bytes) -> None:
    done = run("cowhand convert s.qcow2 - | head -c 1000", image_dir)
    assert done.stdout == source[:1000]
    assert b"Traceback" not in done.stderr


class TestChecksums:
    NAMES = ("plain.raw", "two\nlines.raw", "tab\tbell\x07.raw", "back\\slash.raw", "latin-\udce9.raw", "über.raw")

    def test_lists_hold_every_name_as_it_is_and_verify(self, image_dir: Path) -> None:
        for number, name in enumerate(self.NAMES):
            (image_dir / name).write_bytes(bytes([number]) * 512)
        done = run("cowhand checksum -f raw *.raw > SUMS; cowhand checksum -f raw --check SUMS", image_dir)
        assert done.returncode == 0, done
        theirs = run("sha256sum *.raw", image_dir).stdout
        assert (image_dir / "SUMS").read_bytes() == theirs
        assert run("LC_ALL=C cowhand checksum -f raw *.raw", image_dir).stdout == theirs

    def test_quiet_keeps_the_data_and_what_is_wrong(self, image_dir: Path) -> None:
        (image_dir / "a").write_bytes(bytes(512))
        digest = hashlib.sha256(bytes(512)).hexdigest()
        assert run("cowhand checksum -q -f raw a", image_dir).stdout.decode() == f"{digest}  a\n"
        (image_dir / "SUMS").write_text(f"{digest[::-1]}  a\n")
        assert b"a: FAILED" in run("cowhand checksum -q -f raw --check SUMS", image_dir).stdout


def test_a_picture_on_standard_output_is_nothing_but_the_picture(image_dir: Path, source: bytes) -> None:
    for target in ("-", "/dev/stdout"):
        done = run(f"cowhand map --svg {target} s.qcow2 > out", image_dir)
        assert done.returncode == 0, done.stderr
        text = (image_dir / "out").read_text()
        assert text.lstrip().startswith("<")
        assert text.rstrip().endswith("</svg>")

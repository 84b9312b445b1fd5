"""``convert --salvage`` sums up what could not be read."""

from __future__ import annotations

from pathlib import Path

from cowhand.copy.ops.unreadable import Unreadable
from cowhand.core.errors import IOFailed
from tests.cli.command import cowhand
from tests.cli.images import MiB


def test_ranges_are_counted_once_and_merged() -> None:
    lost, error = Unreadable(), IOFailed("no")
    for offset in (1024, 1536, 512, 1024, 8192, 8704, 9216 + 100, 8192):
        lost.add(offset, error)
    assert lost.ranges(9216 + 200) == ((512, 1536), (8192, 1224))
    assert lost.ranges(512) == () and lost.reason is error


def test_one_line_for_all_sectors(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * MiB)
    (tmp_path / "rules").write_text(
        "".join(f'[inject-error]\nevent = "read_aio"\nsector = "{sector}"\n\n' for sector in (16, 17, 18, 900))
    )
    words = ("convert", "-O", "raw", "--salvage", "blkdebug:rules:disk.raw", "copy.raw")
    done = cowhand(*words, cwd=tmp_path, status=3)
    told = [line for line in done.stderr.splitlines() if "could not be read" in line]
    assert len(told) == 1, done.stderr
    assert "2 KiB could not be read and are zero in the copy, at 0x2000 (1.5 KiB), 0x70800 (512 B)" in told[0]
    assert len(done.stderr.splitlines()) == 1
    found = cowhand(*words, "--overwrite", "--output", "json", cwd=tmp_path, status=3).json()
    assert found["unreadable-ranges"] == [{"start": 8192, "length": 1536}, {"start": 900 * 512, "length": 512}]
    assert found["unreadable-bytes"] == 2048 and found["unreadable"] == [8192, 8704, 9216, 900 * 512]
    copy = bytearray(b"x" * MiB)
    copy[8192 : 8192 + 1536] = bytes(1536)
    copy[900 * 512 : 901 * 512] = bytes(512)
    assert (tmp_path / "copy.raw").read_bytes() == copy

"""An error of reading names the place that failed, not where the request began."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import CowhandError
from tests.tools.qemu import qemu_img, require_qemu

pytestmark = [require_qemu]


def test_the_place_in_the_file_and_in_the_disk(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "a.qcow2"
    raw.write_bytes(random.Random(4).randbytes(4 << 20))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    bad = 0x50000 + (3 << 20) + 512 * 7
    file = {"driver": "file", "filename": str(path)}
    rule = {"event": "none", "iotype": "read", "sector": bad // 512, "errno": 5}
    image = {"driver": "qcow2", "file": {"driver": "blkdebug", "image": file, "inject-error": [rule]}}
    with cowhand.open(image) as disk:
        for begin, length in ((0, 4 << 20), (3 << 20, 1 << 20), ((3 << 20) + 512 * 7, 512)):
            with pytest.raises(CowhandError) as caught:
                disk.read(begin, length)
            assert caught.value.offset == bad
            assert caught.value.facts["guest_offset"] == (3 << 20) + 512 * 7
    with pytest.raises(CowhandError, match=f"reading at {(3 << 20) + 512 * 7:#x}"):
        cowhand.convert(image, tmp_path / "copy", "raw")


def test_what_an_image_that_was_cut_off_lacks(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "a.qcow2"
    raw.write_bytes(random.Random(4).randbytes(4 << 20))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    with path.open("r+b") as file:
        file.truncate(0x50000 + (3 << 20))
    with pytest.raises(CowhandError, match="reading at 0x300000"):
        cowhand.convert(path, tmp_path / "copy", "raw")

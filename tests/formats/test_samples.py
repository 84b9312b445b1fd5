"""Images that hypervisors themselves wrote, from QEMU's source package: the same content as QEMU reads, or refused as QEMU does.

The package is the one that the conformance runs fetch (``make conformance``); COWHAND_QEMU_SOURCE names a tree.
"""

from __future__ import annotations

import bz2
import os
import shutil
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import CowhandError
from tests.tools.qemu import assert_identical, qemu_img, qemu_info, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

_ROOT = Path(__file__).resolve().parents[2]
_CACHE = Path(os.environ.get("COWHAND_CONFORMANCE_CACHE") or _ROOT / "build" / "conformance")
_SAMPLES = (
    "empty.bochs", "hyperv2012r2-dynamic.vhd", "iotest-dirtylog-10G-4M.vhdx", "iotest-version3.vmdk", "parallels-v1",
    "parallels-v2", "parallels-with-bitmap", "simple-dmg.dmg", "simple-pattern.cloop", "virtualpc-dynamic.vhd",
)  # fmt: skip
#: Each has more than 100 MB: long runs only.
_LARGE = ("d2v-zerofilled.vhd", "iotest-dynamic-1G.vhdx", "test-disk2vhd.vhdx")
_REFUSED = ("afl5.img", "afl9.vmdk")


def sample(name: str, folder: Path) -> Path:
    """Return the sample *name*, unpacked in *folder*; skips where there is no source package."""
    given = os.environ.get("COWHAND_QEMU_SOURCE")
    trees = [Path(given)] if given else sorted(_CACHE.glob("qemu-*"))
    for tree in trees:
        packed = tree / "tests" / "qemu-iotests" / "sample_images" / f"{name}.bz2"
        if packed.is_file():
            path = folder / name
            with bz2.open(packed) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
            return path
    pytest.skip("QEMU's sources are not here (make conformance fetches them; or set COWHAND_QEMU_SOURCE)")


@pytest.mark.parametrize("name", [*_SAMPLES, *(_LARGE if os.environ.get("COWHAND_LONG") else ())])
def test_the_content_is_that_which_qemu_reads(name: str, tmp_path: Path) -> None:
    image = sample(name, tmp_path)
    out = tmp_path / "out.raw"
    cowhand.convert(image, out, "raw")
    if "dirtylog" in name:
        qemu_img("check", "-r", "all", image)  # it does not replay a log otherwise
    info = qemu_info(image)
    with cowhand.open(image) as disk:
        assert (disk.format, disk.size) == (info["format"], info["virtual-size"])
    assert_identical(image, info["format"], out, "raw")


@pytest.mark.parametrize("name", _REFUSED)
def test_what_qemu_refuses_is_refused_in_its_words(name: str, tmp_path: Path) -> None:
    image = sample(name, tmp_path)
    with pytest.raises(CowhandError) as caught:
        cowhand.open(image)
    assert caught.value.qemu() in qemu_img("info", image, check=False).stderr

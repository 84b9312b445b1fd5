"""Rebasing: the content stays, whatever lies below before and after; qemu-img is the judge."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import CowhandError
from cowhand.image.create import create
from cowhand.jobs.rebase import rebase
from tests.copy.images import MIB, read_all
from tests.copy.test_commit import chain, change, disk_of
from tests.tools.qemu import assert_clean, qemu_io, require_qemu

pytestmark = [pytest.mark.interop, require_qemu]


@pytest.mark.parametrize("seed", range(4))
def test_the_content_stays(tmp_path: Path, seed: int) -> None:
    """Onto a deeper layer, onto a stranger, onto nothing, and back; sizes differ."""
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 8) * MIB // 2 + rng.randrange(8) * 512 for _ in range(3)]
    layers = chain(rng, tmp_path, sizes)
    stranger = tmp_path / "stranger"
    create(stranger, "qcow2", rng.randrange(1, 8) * MIB // 2)
    change(rng, stranger, MIB // 2)
    top = layers[-1]
    before = disk_of(top)
    for below in (layers[0], stranger, None, layers[1]):
        seen = rebase(top, str(below) if below else None, "qcow2" if below else None, look=True)
        assert disk_of(top) == before
        done = rebase(top, str(below) if below else None, "qcow2" if below else None, compressed=rng.random() < 0.5)
        assert done == seen
        assert disk_of(top) == before
        assert_clean(top)
        with cowhand.open(top) as disk:
            assert (disk.root.backing is None) is (below is None)


def test_what_is_shared_is_not_read_and_zeroes_stay_zeroes(tmp_path: Path) -> None:
    base, middle, top = tmp_path / "base", tmp_path / "middle", tmp_path / "top"
    create(base, "qcow2", 4 * MIB)
    qemu_io(base, "write -P 1 0 4M", format="qcow2")
    create(middle, "qcow2", backing=str(base), backing_format="qcow2")
    qemu_io(middle, "write -z 1M 1M", "write -P 2 2M 64k", format="qcow2")
    create(top, "qcow2", backing=str(middle), backing_format="qcow2")
    result = rebase(top, str(base), "qcow2")
    assert (result.compared, result.copied, result.zeroes) == (MIB + 65536, 65536, MIB)
    with cowhand.open(top) as disk:
        assert read_all(disk) == disk_of(middle)
        assert disk.root.allocated_size() < MIB


def test_a_failed_rebase_leaves_the_old_backing_file(tmp_path: Path) -> None:
    layers = chain(random.Random(5), tmp_path, [MIB, MIB])
    before = disk_of(layers[1])
    with pytest.raises(CowhandError, match="nofile"):
        rebase(layers[1], "nofile", "qcow2")
    with pytest.raises(CowhandError, match="cannot record another backing file"):
        rebase(qemu_raw(tmp_path), str(layers[0]), "qcow2", format="raw")
    assert disk_of(layers[1]) == before


def qemu_raw(folder: Path) -> Path:
    """Return a small raw image."""
    path = folder / "plain.raw"
    path.write_bytes(bytes(MIB))
    return path


def test_unsafe_changes_the_header_alone(tmp_path: Path) -> None:
    layers = chain(random.Random(6), tmp_path, [MIB, MIB])
    before = disk_of(layers[1])
    shutil.move(layers[0], tmp_path / "moved")
    rebase(layers[1], "moved", "qcow2", unsafe=True)
    assert disk_of(layers[1]) == before


def test_the_same_file_read_in_another_way_is_another_backing_file(tmp_path: Path) -> None:
    halves, image = tmp_path / "halves", tmp_path / "image"
    halves.write_bytes(b"A" * MIB + b"B" * MIB)

    def half(offset: int) -> str:
        file = f'"file":{{"driver":"file","filename":"{halves}"}}'
        return f'json:{{"driver":"raw","offset":{offset},"size":{MIB},{file}}}'

    create(str(image), "qcow2", MIB)
    with cowhand.open(image, writable=True) as disk:
        disk.write(0, b"C" * (MIB // 2))
    with image.open("r+b") as file:
        file.truncate(MIB)
    for number, (old, old_format, new) in enumerate(((half(0), "raw", half(MIB)), (str(image), "qcow2", str(image)))):
        top = tmp_path / f"top{number}"
        create(str(top), "qcow2", MIB, backing=old, backing_format=old_format)
        before = disk_of(top)
        rebase(str(top), new, "raw")
        assert disk_of(top) == before

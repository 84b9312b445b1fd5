"""Full disks: known before they are met, and explained when they are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowhand
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import NoSpace
from cowhand.image.check import check
from cowhand.jobs.commit import commit
from tests.copy.images import MIB, read_all
from tests.copy.mounts import needs_root, tmpfs
from tests.tools.programs import require

pytestmark = [needs_root, require("mount"), pytest.mark.root]


def test_what_certainly_does_not_fit_is_refused_before_it_is_begun(tmp_path: Path, rng: random.Random) -> None:
    (tmp_path / "raw").write_bytes(rng.randbytes(8 * MIB))
    with tmpfs(tmp_path / "small", "4m") as folder:
        for settings in ({"sparse_size": 0}, {"options": {"preallocation": "full"}}):
            with pytest.raises(NoSpace, match=r"needs 8 MiB .*, of which 4 MiB are free") as caught:
                convert(tmp_path / "raw", folder / "x", "raw", source_format="raw", **settings)  # type: ignore[arg-type]
            assert "Make 4 MiB free" in str(caught.value)
            assert list(folder.iterdir()) == []


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_may_not_fit_is_said_and_tried(tmp_path: Path, rng: random.Random, format: str) -> None:
    warnings: list[str] = []
    with tmpfs(tmp_path / "small", "4m") as folder:
        # Zeroes that only reading can find: it fits after all.
        (tmp_path / "raw").write_bytes(rng.randbytes(2 * MIB) + bytes(6 * MIB))
        convert(tmp_path / "raw", folder / "x", format, source_format="raw", warn=warnings.append)
        with cowhand.open(folder / "x", format=format) as disk:
            assert read_all(disk) == (tmp_path / "raw").read_bytes()
    assert len(warnings) == 1
    assert warnings[0].startswith("the target may not fit: up to 8 MiB for ")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_full_disk_leaves_nothing_and_says_how_much_is_missing(
    tmp_path: Path, rng: random.Random, format: str, compressed: bool
) -> None:
    if compressed and format == "raw":
        compressed = False
    (tmp_path / "raw").write_bytes(rng.randbytes(80 * MIB))
    with tmpfs(tmp_path / "small", "9m") as folder:
        with pytest.raises(NoSpace) as caught:
            convert(tmp_path / "raw", folder / "x", format, source_format="raw", compressed=compressed)
        assert "more are needed" in str(caught.value)
        assert str(folder / "x") in str(caught.value)
        assert "No space left on device" in caught.value.qemu()
        assert list(folder.iterdir()) == []


def test_a_commit_that_does_not_fit_keeps_the_top(tmp_path: Path, rng: random.Random) -> None:
    data = rng.randbytes(8 * MIB)
    with tmpfs(tmp_path / "small", "12m") as folder:
        base, top = folder / "base", tmp_path / "top"
        cowhand_create(base, top, 8 * MIB)
        with cowhand.open(top, writable=True) as disk:
            disk.write(0, data)
        (folder / "filler").write_bytes(bytes(6 * MIB))
        with pytest.raises(NoSpace):
            commit(top)
        with cowhand.open(top) as disk:
            assert read_all(disk) == data
        assert check(base).corruptions == 0
        (folder / "filler").unlink()
        # What was taken for data that could not be linked any more is lost space, which a repair gives back.
        check(base, repair="leaks")
        commit(top)
        with cowhand.open(base) as disk:
            assert read_all(disk) == data


def cowhand_create(base: Path, top: Path, size: int) -> None:
    from cowhand.image.create import create

    create(base, "qcow2", size)
    create(top, "qcow2", backing=str(base), backing_format="qcow2")

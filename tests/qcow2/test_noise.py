"""Checking tables that are noise: what is counted as columns, told or not, is what is counted entry by entry; memory is bounded."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from cowhand.block.formats.qcow2.check import check as qcow2_check, references
from cowhand.image.check import check
from tests.tools.qemu import qemu_img, require_qemu

pytestmark = [require_qemu]


def noisy(path: Path, options: str, length: int, seed: int) -> None:
    """Make an image whose data is noise, and whose header says that its L1 table goes on through all of it."""
    rng = random.Random(seed)
    words = [
        rng.getrandbits(64) & rng.choice((-1, 0x800000000007FFFF, 0xC0000000001FFE00, 0x80000000000FF001, 0))
        for _ in range(length // 8)
    ]
    raw = path.with_suffix(".raw")
    raw.write_bytes(struct.pack(f">{len(words)}Q", *(word & (1 << 64) - 1 for word in words)))
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(length))
    qemu_img("convert", "-n", "-f", "raw", "-O", "qcow2", raw, path)
    with path.open("r+b") as file:
        file.seek(36)
        file.write(struct.pack(">I", length // 8))


def counted(path: Path) -> tuple[Any, ...]:
    result = check(path, format="qcow2")
    return (
        result.corruptions, result.leaks, result.check_errors, result.allocated_clusters, result.fragmented_clusters,
        result.compressed_clusters, result.image_end_offset,
    )  # fmt: skip


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=512", "cluster_size=16k,extended_l2=on"])
@pytest.mark.parametrize("seed", range(2))
def test_columns_count_as_entries_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, seed: int) -> None:
    path = tmp_path / "a.qcow2"
    noisy(path, options, 96 << 10, seed)
    monkeypatch.setattr(references, "_MOST_TOLD", 1 << 30)
    monkeypatch.setattr(qcow2_check, "MAX_FINDINGS", 1 << 30)
    one_by_one = counted(path)
    assert one_by_one[0] > 1000
    monkeypatch.setattr(references, "_MOST_TOLD", 10)
    monkeypatch.setattr(qcow2_check, "MAX_FINDINGS", 10)
    assert counted(path) == one_by_one

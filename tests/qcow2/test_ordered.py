"""Tables in order are told from others by comparing bytes, wherever they begin and whatever single bit differs."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cowhand.block.create import create
from cowhand.block.formats.qcow2 import layout as L
from cowhand.block.formats.qcow2.ordered import OrderedTables

DATA, ZEROES = 0xFFFFFFFF, 0xFFFFFFFF << 32


def table(bits: int, first: int, bitmap: int | None) -> bytearray:
    count = (1 << bits) // (8 if bitmap is None else 16)
    words = [struct.pack(">Q", first + (number << bits)) for number in range(count)]
    return bytearray(b"".join(word + (b"" if bitmap is None else struct.pack(">Q", bitmap)) for word in words))


@pytest.mark.parametrize("bits", [9, 12, 16, 17])
@pytest.mark.parametrize("stride", [1, 2])
def test_only_tables_in_order_match(bits: int, stride: int) -> None:
    rng = random.Random(bits * stride)
    tables = OrderedTables(bits, stride)
    for turn in range(24):
        cluster = rng.choice((1, rng.getrandbits(12), rng.getrandbits(55 - bits) | 1))
        first = (cluster << bits & L.L2_OFFSET_MASK >> 1 | 1 << bits) | (L.COPIED if turn % 8 else 0)
        bitmap = None if stride == 1 else rng.choice((DATA, ZEROES, 5)) if turn > 16 else DATA
        data = table(bits, first, bitmap)
        following = tables.matches(bytes(data))
        if turn < 9 or stride == 1:
            assert following  # later on there were too many kinds
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        assert not tables.matches(bytes(data))


def test_many_tables_in_order_are_checked_without_numpy(tmp_path: Path) -> None:
    for options in ({}, {"extended_l2": "on"}):
        path = tmp_path / "big.qcow2"
        create(path, "qcow2", 2 << 30, {"cluster_size": "16k", "preallocation": "metadata", **options})
        code = (
            "import sys; from cowhand.block.check import check\n"
            f"result = check({str(path)!r})\n"
            "assert not result.corruptions and not result.leaks, result\n"
            "assert 'numpy' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        path.unlink()

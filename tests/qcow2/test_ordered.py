"""Tables in order are told from others by comparing bytes, wherever they begin and whatever single bit differs."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import cowhand
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_ordered import OrderedTables
from cowhand.core.extents import NO_HOST
from cowhand.image.create import create

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


def test_a_row_ends_where_a_table_is_not_in_order(tmp_path: Path) -> None:
    """Whole tables are told in one row, and the rows are those of qemu-img where a single entry, or bitmap, differs."""
    for stride, options in ((1, {}), (2, {"extended_l2": "on"})):
        path = tmp_path / "image.qcow2"
        create(path, "qcow2", 192 << 20, {"cluster_size": "16k", **options})
        with cowhand.open(path, writable=True) as disk:
            for offset in range(0, 192 << 20, 16 << 20):
                disk.write(offset, b"d" * (16 << 20))
            disk.discard(70 << 20, 16384)
            disk.write_zeroes((101 << 20) - 512, 1024)
            rows = [(row.start, row.length, row.flags, row.host) for batch in disk.extents() for row in batch]
            parts = [
                (row.start, row.length, row.flags, row.host)
                for offset in range(0, 192 << 20, 1 << 20)
                for batch in disk.extents(offset, 1 << 20)
                for row in batch
            ]
        assert len(rows) < 40 // stride + 12
        assert merged_rows(parts) == merged_rows(rows)
        path.unlink()


def merged_rows(rows: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    out: list[tuple[int, int, int, int]] = []
    for start, length, flags, host in rows:
        if out:
            begin, count, known, place = out[-1]
            if known == flags and (host == place + count or host == place == NO_HOST):
                out[-1] = (begin, count + length, flags, place)
                continue
        out.append((start, length, flags, host))
    return out


def test_many_tables_in_order_are_checked_and_mapped_without_numpy(tmp_path: Path) -> None:
    for options in ({}, {"extended_l2": "on"}):
        path = tmp_path / "big.qcow2"
        create(path, "qcow2", 2 << 30, {"cluster_size": "16k", "preallocation": "metadata", **options})
        code = (
            "import sys, cowhand; from cowhand.image.check import check\n"
            f"result = check({str(path)!r})\n"
            "assert not result.corruptions and not result.leaks, result\n"
            "assert 'numpy' not in sys.modules\n"
            "from cowhand.block.formats.qcow2.cluster import mapping; mapping._MANY_TABLES = -1\n"
            f"with cowhand.open({str(path)!r}) as disk: assert sum(sum(batch.length) for batch in disk.extents()) == 2 << 30\n"
            f"assert {bool(options)} or 'numpy' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        path.unlink()

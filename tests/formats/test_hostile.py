"""Damaged images that are written: an error of ours, in bounded time, or success; never anything else.

Reading of damaged images is in the contract of each format (``cowhand.testing.mapped``). COWHAND_MUTATIONS sets how many are tried.
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.drivers import REGISTRY
from cowhand.testing.mapped import MUTATIONS, PATIENCE
from tests.formats.test_crash import FORMATS

#: Where headers and tables of small new images lie.
_METADATA = {
    "vdi": ((0, 1024),),
    "vmdk": ((0, 1024), (21 * 512, 21 * 512 + 4096)),
    "vpc": ((0, 2560),),
    "vhdx": tuple((at, at + 256) for at in (64 << 10, 128 << 10, 192 << 10, 2 << 20, (2 << 20) + 65536, 3 << 20)),
    "qed": ((0, 64), (4096, 4160), (8192, 8256)),
    "qcow": ((0, 128), (4096, 4224)),
    "parallels": ((0, 192),),
}  # fmt: skip


def workload(disk: Disk) -> None:
    size = disk.size
    for offset in (0, size // 2 // 512 * 512, max(0, size - 5000)):
        count = min(5000, size - offset)
        disk.write(offset, b"w" * count)
        disk.write_zeroes(offset, min(count, 600))
    disk.flush()
    disk.write(0, b"x" * min(512, size))


@pytest.mark.parametrize(
    ("driver", "size", "options"), FORMATS, ids=lambda value: str(value) if isinstance(value, str) else None
)
def test_damaged_images_are_written_or_refused(driver: str, size: int, options: dict[str, Any]) -> None:
    made = MemoryNode()
    entry: Any = REGISTRY.get(driver).load()
    entry.create(made, size, options)
    with Disk(Opening(REGISTRY).open({"driver": driver, "file": made, "read-only": False}), writable=True) as disk:
        disk.write(4096, b"first" * 2000)
        disk.flush()
        good = made.copy()
    rng, refused = random.Random(driver + str(options)), 0
    for number in range(MUTATIONS):
        bad = good.copy()
        for _ in range(rng.randrange(1, 4)):
            begin, end = rng.choice(_METADATA[driver])
            at, width = rng.randrange(begin, end), rng.choice((1, 1, 2, 4, 8))
            value = rng.choice((b"\0", b"\1", b"\x7f", b"\x80", b"\xff", rng.randbytes(1))) * width
            bad.write(at, (value,))
        began = time.monotonic()
        try:
            with Disk(
                Opening(REGISTRY).open({"driver": driver, "file": bad, "read-only": False}), writable=True
            ) as disk:
                if disk.size > 1 << 50:
                    continue
                workload(disk)
        except CowhandError:
            refused += 1
        assert time.monotonic() - began < PATIENCE, f"mutation {number} took too long"
    assert refused < MUTATIONS

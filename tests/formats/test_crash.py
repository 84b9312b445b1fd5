"""Power failures: whatever a medium keeps of a workload, what was flushed is there, and the image can be opened, read and written again."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.drivers import REGISTRY
from cowhand.testing.expected import ExpectedContent
from cowhand.testing.recorder import RecorderNode
from cowhand.testing.replay import CrashState, crash_states, replay

#: Sampled outcomes of each workload, beside all prefixes, torn and single ones.
SAMPLES = int(os.environ.get("COWHAND_CRASHES", "40"))
KIB, MIB = 1 << 10, 1 << 20
FORMATS: list[tuple[str, int, dict[str, Any]]] = [
    ("vdi", 4 * MIB, {}),
    ("vmdk", 512 * KIB, {}),
    ("vmdk", 512 * KIB, {"zeroed_grain": True}),
    ("vpc", 5 * MIB, {"force_size": True}),
    ("vhdx", 4 * MIB, {"block_size": MIB}),
    ("qed", 128 * KIB, {"cluster_size": 4096, "table_size": 1}),
    ("qcow", 64 * KIB, {}),
    ("parallels", 256 * KIB, {"cluster_size": 16 * KIB}),
]


def opened(driver: str, file: Any, *, writable: bool) -> Disk:
    what = {"driver": driver, "file": file, "read-only": not writable}
    return Disk(Opening(REGISTRY).open(what), writable=writable)


def work(disk: Disk, expected: ExpectedContent, rng: random.Random) -> None:
    """Write, zero and flush here and there."""
    for step in range(14):
        length = rng.choice((512, 1024, 4096, 9 * 512))
        offset = rng.randrange((disk.size - length) // 512) * 512
        if rng.random() < 0.2:
            with expected.zeroing(offset, length):
                disk.write_zeroes(offset, length)
        else:
            data = rng.randbytes(length)
            with expected.writing(offset, data):
                disk.write(offset, data)
        if step % 4 == 3:
            with expected.flushing():
                disk.flush()


@pytest.mark.parametrize(
    ("driver", "size", "options"), FORMATS, ids=lambda value: str(value) if isinstance(value, str) else None
)
def test_what_was_flushed_is_there(driver: str, size: int, options: dict[str, Any]) -> None:
    rng = random.Random(driver)
    made = MemoryNode()
    entry: Any = REGISTRY.get(driver).load()
    entry.create(made, size, {"block_state_zero": True, **options} if driver == "vhdx" else options)
    recorder = RecorderNode(made)
    expected = ExpectedContent(recorder.log, size)
    with opened(driver, recorder, writable=True) as disk:
        work(disk, expected, rng)
    number = 0

    def check(state: CrashState) -> None:
        nonlocal number
        number += 1
        again = state.image.copy()
        with opened(driver, state.image, writable=False) as disk:
            expected.check(disk.read(0, size), state.moment)
            before = disk.read(0, size)
        if number % 8 or driver == "parallels":
            return  # what was not closed is not written, by parallels
        with opened(driver, again, writable=True) as disk:
            disk.write(size - 1024, b"again!!!" * 64)
            disk.flush()
            assert disk.read(0, size) == before[: size - 1024] + b"again!!!" * 64 + before[size - 512 :]

    assert replay(crash_states(recorder.log, samples=SAMPLES), check) > 50

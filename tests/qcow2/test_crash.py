"""Power failures: random lives of small images are recorded, and every state that the medium could then hold is looked at.

Every prefix; every change torn at 512 and 4096 bytes; every change lost alone and surviving alone between two flushes; 200 sampled subsets and
orders. Each must check clean but for leaks, hold every flushed sector and every snapshot, and be usable. COWHAND_TEST_SCALE=10 lives ten times
as many lives.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cowhand.block.protocols.memory import MemoryNode
from cowhand.testing import replay
from tests.qcow2 import oracle
from tests.qcow2.images import Shape
from tests.qcow2.life import DIRTY, Life
from tests.tools.qemu import assert_clean, qemu_img, qemu_io, require_qemu

SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))
SAMPLES = 200

#: Tiny clusters make every table grow: an L2 table covers 32 KiB, a refcount block of 64-bit counts 32 KiB of the file.
SHAPES = [
    (Shape(), 5),
    (Shape(backed=True), 5),
    (Shape(version=2), 3),
    (Shape(version=2, cluster=1024, backed=True), 3),
    (Shape(refcount_bits=64, backed=True), 4),
    (Shape(refcount_bits=1), 2),
    (Shape(backed=True, refcount_bits=64, cache=1024), 3),
    (Shape(cluster=4096, size=512 << 10, backed=True), 3),
    (Shape(cluster=65536, size=512 << 10), 1),
    (Shape(cluster=16384, size=256 << 10, extended=True), 1),
    (Shape(cluster=16384, size=256 << 10, extended=True, backed=True), 2),
    (Shape(cluster=16384, size=256 << 10, extended=True, backed=True, shrinks=True), 1),
    (Shape(cluster=32768, size=256 << 10, extended=True, backed=True, data="plain"), 1),
    (Shape(data="plain"), 1),
    (Shape(data="plain", backed=True, shrinks=True), 2),
    (Shape(cluster=4096, size=256 << 10, data="raw", shrinks=True), 2),
    (Shape(shrinks=True), 1),
    (Shape(cluster=4096, size=256 << 10, backed=True, encrypt="luks"), 1),
    (Shape(cluster=1024, encrypt="aes", shrinks=True), 1),
    (Shape(amended=True), 1),
    (Shape(amended=True, backed=True), 2),
    (Shape(cluster=16384, size=256 << 10, extended=True, amended=True), 1),
    (Shape(shrinks=True, backed=True, refcount_bits=64), 2),
]


def lives() -> list[Any]:
    """Return (shape, seed) for each life to live."""
    return [
        pytest.param(shape, seed, id=f"{shape}-{seed}")
        for shape, count in SHAPES
        for seed in range(max(1, int(count * SCALE)))
    ]


def live(shape: Shape, seed: int, steps: int, places: Sequence[tuple[int, int]] = ()) -> Life:
    rng = random.Random(f"{shape} {seed} {os.environ.get('COWHAND_SEED', '')}")
    # Small writes one by one are stricter than any medium; whole sectors are what media do.
    life = Life(shape, rng, sector=rng.choice((1, 512)))
    for place in places:
        life.write_at(*place)
    life.run(steps)
    return life


@pytest.mark.parametrize(("shape", "seed"), lives())
def test_a_power_failure_leaks_at_worst(shape: Shape, seed: int) -> None:
    life = live(shape, seed, steps=40)
    states = replay.crash_states(life.log, samples=SAMPLES, seed=seed)
    count = replay.replay(states, life.judge)
    assert count > SAMPLES
    assert life.verdicts.used_on > 0
    # A raw data file has all tables from the beginning.
    assert life.verdicts.leaking > 0 or shape.data == "raw", (
        "no state even leaks: the workload was too tame to prove anything"
    )


@pytest.mark.parametrize(
    "shape", [Shape(lazy=True), Shape(lazy=True, backed=True, cluster=4096, size=256 << 10)], ids=str
)
def test_lazy_reference_counts_are_repaired_after_a_power_failure(shape: Shape) -> None:
    """Without counts on disk the image is worth what the repair makes of it that its dirty bit demands: everything."""
    life = live(shape, 0, steps=40)
    replay.replay(replay.crash_states(life.log, samples=SAMPLES), life.judge)
    assert life.verdicts.repaired > 0


@pytest.mark.parametrize("seed", range(max(1, int(2 * SCALE))))
def test_a_power_failure_while_the_refcount_table_grows(seed: int) -> None:
    """The file is just short of the 2 MiB that one cluster of refcount table describes, so the table moves while it is recorded."""
    filled = 1972 << 10
    shape = Shape(refcount_bits=64, size=2200 << 10, filled=filled)
    life = live(shape, seed, steps=8, places=[(filled + at, 2048) for at in range(0, 32768, 2048)])
    tables = {table_offset(state.image) for state in replay.prefixes(life.log)}
    assert len(tables) > 1, "the refcount table did not move"
    replay.replay(replay.prefixes(life.log), life.judge)
    replay.replay(replay.singles(life.log, limit=60, seed=seed), life.judge)
    replay.replay(replay.torn(life.log, (512,), seed=seed), life.judge)
    replay.replay(replay.sampled(life.log, SAMPLES // 4, seed=seed), life.judge)


@pytest.mark.parametrize("seed", range(max(1, int(3 * SCALE))))
@pytest.mark.parametrize("shape", [Shape(backed=True), Shape(cluster=4096, size=256 << 10), Shape(version=2)], ids=str)
def test_a_power_failure_under_writing_threads(shape: Shape, seed: int) -> None:
    """What is under way in other threads when one of them flushes may be there or not; what was acknowledged before is."""
    life = Life(shape, random.Random(f"threads {shape} {seed}"), sector=512)
    life.run_threads(4, steps=20)
    assert replay.replay(replay.crash_states(life.log, samples=SAMPLES, seed=seed), life.judge) > SAMPLES


def table_offset(image: MemoryNode) -> int:
    """Return where the header says that the refcount table lies."""
    field = bytearray(8)
    image.read_into(48, field)
    return int.from_bytes(field, "big")


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize(
    ("shape", "seed"), [(Shape(), 100), (Shape(backed=True), 101), (Shape(version=2), 102)], ids=str
)
def test_qemu_agrees_about_what_a_power_failure_left(shape: Shape, seed: int, tmp_path: Path) -> None:
    life = live(shape, seed, steps=40)
    path = tmp_path / "crashed.qcow2"
    states = [*replay.prefixes(life.log), *replay.sampled(life.log, SAMPLES, seed=seed)]
    for state in random.Random(seed).sample(states, 30):
        path.write_bytes(state.image.snapshot_bytes())
        busy = any(begin < state.moment <= end for begin, end in life.reflagging)
        if oracle.Image(path.read_bytes()).incompatible & DIRTY:
            # In the middle of an operation on snapshots COPIED bits lag behind, and the image says so: who opens it for writing repairs it.
            qemu_io(path, "read 0 512", format="qcow2")
            assert_clean(path)
        elif busy and shape.version == 2:
            # Version 2 cannot say so. qemu-img names those bits alone, and puts them right.
            report = qemu_img("check", "-f", "qcow2", path, check=False)
            errors = [line for line in (report.stdout + report.stderr).splitlines() if line.startswith("ERROR")]
            assert all(line.startswith("ERROR OFLAG_COPIED") for line in errors), errors
            qemu_img("check", "-r", "all", "-f", "qcow2", path)
            assert_clean(path)
        else:
            assert_clean(path, leaks_allowed=True)

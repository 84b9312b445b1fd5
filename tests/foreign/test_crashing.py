"""Power failures and failing media under lives of drawn images: at worst more space is lost than was before.

COWHAND_TEST_SCALE=50 lives fifty times as many lives; COWHAND_SEED others.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cowhand.core.errors import CowhandError
from cowhand.testing import replay
from cowhand.testing.faults import ALL, CHANGES, FLUSH, GROWTH, HALF, NOTHING, READ, FaultNode
from tests.foreign.crashing import DrawnLife, suits
from tests.foreign.images import Image, draw

SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))
SEED = int(os.environ.get("COWHAND_SEED", "0"))


def drawn(folder: Path, count: float, first: int) -> Iterator[tuple[int, Image]]:
    """Yield *count* images that suit."""
    found, seed = 0, first
    while found < max(1, count):
        (folder / str(seed)).mkdir()
        image = draw(seed, folder / str(seed))
        if suits(image):
            found += 1
            yield seed, image
        seed += 1


def failing(rng: random.Random, code: int, media: list[FaultNode]) -> Callable[[FaultNode], None]:
    """Return what has a medium fail one request, or all from then on, with *code*, and adds it to *media*."""
    kinds = rng.choice((CHANGES, GROWTH, frozenset((READ,)), frozenset((FLUSH,))))
    nth, done, lasting = int(2 ** rng.uniform(0, 8)), rng.choice((NOTHING, HALF, ALL)), rng.random() < 0.3

    def arrange(node: FaultNode) -> None:
        media.append(node)
        node.fail(kinds, nth, code, lasting=lasting, done=done)

    return arrange


def test_a_power_failure_takes_nothing_that_was_flushed(tmp_path: Path) -> None:
    for seed, image in drawn(tmp_path, 4 * SCALE, SEED):
        rng = random.Random(f"crash {seed}")
        life = DrawnLife(image, rng, sector=rng.choice((1, 512)))
        try:
            life.live(12)
            states = replay.crash_states(life.log, samples=40, single_limit=40, seed=seed)
            assert replay.replay(states, life.judge) > 40
        except Exception as error:
            error.add_note(f"seed {seed}, {image.shape}, {image.odd}")
            raise


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_costs_at_most_its_request(code: int, tmp_path: Path) -> None:
    failed = 0
    for seed, image in drawn(tmp_path, 12 * SCALE, SEED):
        rng = random.Random(f"fault {code} {seed}")
        media: list[FaultNode] = []
        try:
            life = DrawnLife(image, rng, sector=rng.choice((1, 512)), fault=failing(rng, code, media))
        except CowhandError:
            continue  # opening failed
        try:
            life.live(12)
            life.judge(life.end())
        except Exception as error:
            error.add_note(f"seed {seed}, {image.shape}, {image.odd}: {'; '.join(life.steps)}")
            raise
        failed += media[0].failed
    assert failed or SEED

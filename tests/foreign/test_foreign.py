"""Images that are legal and that no program here would lay out so: drawn from the specification, read, checked and changed by both sides.

COWHAND_TEST_SCALE=50 draws fifty times as many; COWHAND_SEED draws others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.foreign.cutting import misread
from tests.foreign.images import Image, draw
from tests.foreign.judging import told_differently
from tests.foreign.living import lived_differently
from tests.foreign.treating import mistreated
from tests.tools.qemu import require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))
SEED = int(os.environ.get("COWHAND_SEED", "0"))


def judged(folder: Path, judge: Callable[[Image, int], Iterable[str]], count: int) -> None:
    """Have *judge* look at *count* drawn images, and more or others as the environment says."""
    for seed in range(SEED, SEED + max(1, int(count * SCALE))):
        own = folder / str(seed)
        own.mkdir()
        image = draw(seed, own)
        found = list(judge(image, seed))
        assert not found, f"seed {seed}, {image.shape}, {image.odd}: " + "\n".join(found)


def test_both_sides_say_the_same(tmp_path: Path) -> None:
    judged(tmp_path, lambda image, _: told_differently(image), 15)


def test_both_sides_change_them_alike(tmp_path: Path) -> None:
    judged(tmp_path, lived_differently, 5)


def test_they_are_compacted_repaired_and_converted(tmp_path: Path) -> None:
    judged(tmp_path, mistreated, 8)


def test_what_is_left_of_a_cut_off_image_is_read_and_the_rest_is_an_error(tmp_path: Path) -> None:
    judged(tmp_path, misread, 15)

"""Reference counts that are wrong lose nothing: neither what is written, nor what snapshots hold, whatever is done to the image.

COWHAND_TEST_SCALE and COWHAND_SEED as in ``test_foreign``.
"""

from __future__ import annotations

from pathlib import Path

from tests.foreign.images import draw
from tests.foreign.miscounting import Counts, lost_by_miscounting
from tests.foreign.test_foreign import SCALE, SEED


def test_lives_of_miscounted_images_lose_nothing(tmp_path: Path) -> None:
    for seed in range(SEED, SEED + max(1, int(60 * SCALE))):
        own = tmp_path / str(seed)
        own.mkdir()
        image = draw(seed, own)
        found = list(lost_by_miscounting(image, seed))
        assert not found, f"seed {seed}, {image.shape}, {image.odd}: " + "\n".join(found)


def test_counts_are_found_where_they_were_drawn(tmp_path: Path) -> None:
    image = draw(0, tmp_path)
    counts = Counts(bytearray(image.path.read_bytes()))
    used = counts.used()
    assert 0 in used and len(used) > 4
    for number in used:
        had = counts.get(number)
        counts.set(number, 0)
        assert counts.get(number) == 0
        counts.set(number, had)
    assert bytes(counts.data) == image.path.read_bytes()

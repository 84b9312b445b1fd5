"""A field with a value that is too wide for a number of the machine, or for the system: every verb ends with an answer or an error of ours.

Each field takes one of the wide values here, another one by COWHAND_SEED, and all of them with COWHAND_WIDE=all.
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path

import pytest

from tests.hostile import pool, verbs, wide
from tests.hostile.treatment import Finding

_ALL = os.environ.get("COWHAND_WIDE") == "all"
_SEED = int(os.environ.get("COWHAND_SEED", "0"))

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc"
)


def _chosen(kind: str) -> list[str]:
    names = list(wide.wide_names(kind))
    if _ALL:
        return names
    fields = [list(group) for _, group in groupby(names, lambda name: name.rpartition("/")[0])]
    return [values[(number + _SEED) % len(values)] for number, values in enumerate(fields)]


@pytest.mark.parametrize("kind", wide.KINDS)
def test_every_field_at_wide_values_through_every_verb(kind: str, tmp_path: Path) -> None:
    pool.check(_chosen(kind), tmp_path)


def test_sound_images_go_through_every_verb(tmp_path: Path) -> None:
    """Otherwise an error at once would prove nothing of the verb behind it."""
    for kind in ("plain", "bitmaps"):
        image, _ = wide.KINDS[kind]()
        path = tmp_path / "image"
        path.write_bytes(image)
        verbs.every(path, verbs.LOOKING[:4] + verbs.CHANGING[:3])


def test_an_internal_error_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cowhand.cli.commands import info

    def broken(*ignored: object) -> int:
        raise OverflowError("a mistake")

    monkeypatch.setattr(info, "run", broken)
    path = tmp_path / "image"
    path.write_bytes(wide.KINDS["plain"]()[0])
    with pytest.raises(Finding, match="ended with 70"):
        verbs.every(path, verbs.LOOKING[:1])

"""Both tools answer every line of every scene with the same text on both streams, and the same status."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.sides import lines, play, scenes
from tests.tools.qemu import require_qemu

pytestmark = [pytest.mark.interop, require_qemu]


@pytest.mark.parametrize("scene", scenes(), ids=lambda scene: scene.stem)
def test_same_answers(scene: Path, tmp_path: Path) -> None:
    """Play *scene* on both sides, each in a folder of its own."""
    folders = tmp_path / "real", tmp_path / "own"
    for folder in folders:
        folder.mkdir()
    differences = []
    for line in lines(scene):
        expected = play(line, folders[0], real=True)
        found = play(line, folders[1], real=False)
        for name in ("status", "out", "err"):
            wanted, got = getattr(expected, name), getattr(found, name)
            if wanted != got:
                differences.append(f"$ {line}\n  {name} of QEMU: {wanted!r}\n  {name} here:    {got!r}")
    assert not differences, "\n" + "\n".join(differences)

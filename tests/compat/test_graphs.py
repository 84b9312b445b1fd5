"""Both tools answer alike when drawn graphs of drivers are opened, in all three ways of writing them down: text, status, and the files afterwards.

COWHAND_TEST_SCALE=20 draws twenty times as many; COWHAND_SEED draws others. In a long run some differ: of two mistakes in one graph the tools may
tell of different ones.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

from tests.compat.graphs import FOLDER, draw
from tests.compat.sides import play, run_own, run_real
from tests.tools.qemu import require_qemu

pytestmark = [pytest.mark.interop, require_qemu]

SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))
SEED = int(os.environ.get("COWHAND_SEED", "2") or "2")
_LINES = 30


def test_same_answers_to_drawn_graphs(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    for line in FOLDER.splitlines():
        outcome = play(line, template, real=True)
        assert outcome.status == 0, outcome
    folders = [tmp_path / "real", tmp_path / "own"]
    differences: list[str] = []
    for words in draw(SEED, int(_LINES * SCALE)):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(template, folder)
        outcomes = [run_real(words, folders[0]), run_own(words, folders[1])]
        for name in ("status", "out", "err"):
            wanted, got = (getattr(outcome, name) for outcome in outcomes)
            if wanted != got:
                differences.append(f"$ {shlex.join(words)}\n  {name} of QEMU: {wanted!r}\n  {name} here:    {got!r}")
        wanted, got = ({path.name: path.stat().st_size > 0 for path in folder.rglob("*")} for folder in folders)
        if wanted != got:
            differences.append(f"$ {shlex.join(words)}\n  files of QEMU: {wanted}\n  files here:    {got}")
    assert not differences, f"{len(differences)} differences\n" + "\n".join(differences)

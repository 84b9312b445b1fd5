"""Both tools answer drawn command lines alike: text on both streams, status, and the files that are there afterwards.

COWHAND_TEST_SCALE=20 draws twenty times as many; COWHAND_SEED draws others.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.compat.commandlines import COMMANDS, FOLDER, draw
from tests.compat.sides import Outcome, play, run_own, run_real
from tests.tools.programs import installed_profile
from tests.tools.qemu import require_qemu

pytestmark = [pytest.mark.interop, require_qemu]

SCALE = float(os.environ.get("COWHAND_TEST_SCALE", "1"))
SEED = int(os.environ.get("COWHAND_SEED", "7") or "7")
_GROUPS = 4
_PLACE = re.compile(r'"(?:offset|image-end-offset|fragmented-clusters)": \d+')
_PROGRESS = re.compile(r"(    \(0\.00/100%\)\r)(?:    \([0-9.]+/100%\)\r)*")
_LINES = 8 * len(COMMANDS)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the images that the lines name."""
    folder = tmp_path_factory.mktemp("images") / "template"
    folder.mkdir()
    for line in FOLDER.splitlines():
        outcome = play(line, folder, real=True)
        assert outcome.status == 0, outcome
    return folder


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what tells whether a file was touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _description(path: Path, *, places: bool) -> list[str]:
    """Return what QEMU says of an image: what it is, and what it stores; with *places* also where."""
    out = []
    for words in (["info", "--output=json"], ["map", "--output=json"], ["check", "--output=json"]):
        done = run_real(["qemu-img", *words, path.name], path.parent)
        text = done.out if places else _PLACE.sub("PLACE", done.out)
        out.append(f"{done.status} {text}")
    return out


def _fresh(folder: Path, template: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)


def _compared(outcome: Outcome) -> Outcome:
    """Return *outcome* with progress as its beginning: its steps depend on how a copy is cut."""
    return Outcome(outcome.status, _PROGRESS.sub(r"\1...", outcome.out), outcome.err)


def _differences(line: list[str], outcomes: list[Outcome]) -> list[str]:
    out = []
    for name in ("status", "out", "err"):
        wanted, got = (getattr(outcome, name) for outcome in outcomes)
        if wanted != got:
            out.append(f"$ {shlex.join(line)}\n  {name} of QEMU: {wanted!r}\n  {name} here:    {got!r}")
    return out


def _told_otherwise(line: list[str]) -> bool:
    """Tell whether the installed version is known to read *line* wrongly: Debian's 10.0 knows no suffix of dd's count and skip."""
    counts = [word for word in line if word.startswith(("count=", "skip="))]
    return installed_profile() == "10.0" and line[1] == "dd" and any(word[-1:].isalpha() for word in counts)


@pytest.mark.parametrize("group", range(_GROUPS))
def test_same_answers_to_drawn_command_lines(group: int, template: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "real", tmp_path / "own"]
    for folder in folders:
        _fresh(folder, template)
    before = [_state(folder) for folder in folders]
    differences: list[str] = []
    for line in draw(SEED * _GROUPS + group, int(_LINES * SCALE)):
        if _told_otherwise(line):
            continue
        outcomes = [_compared(run_real(line, folders[0])), _compared(run_own(line, folders[1]))]
        differences += _differences(line, outcomes)
        after = [_state(folder) for folder in folders]
        # QEMU removes what it could not make an image of; here it stays.
        spared = {name for name, now in after[1].items() if outcomes[1].status and now == before[1].get(name)} - after[
            0
        ].keys()
        if after[0].keys() != after[1].keys() - spared:
            differences.append(
                f"$ {shlex.join(line)}\n  files of QEMU: {sorted(after[0])}\n  files here:    {sorted(after[1])}"
            )
        else:
            for name in after[0]:
                touched = any(now.get(name) != then.get(name) for now, then in zip(after, before, strict=True))
                if name in before[1] and after[1][name] == before[1][name] and outcomes[1].status:
                    continue  # QEMU empties an image before it looks at the options of the new one
                if touched and line[1] != "dd" and (folders[0] / name).read_bytes() != (folders[1] / name).read_bytes():
                    # In which order a commit writes is nobody's business.
                    places = line[1] != "commit"
                    wanted, got = (_description(folder / name, places=places) for folder in folders)
                    if wanted != got:
                        differences.append(f"$ {shlex.join(line)}\n  {name} of QEMU: {wanted}\n  {name} here:    {got}")
        for index, folder in enumerate(folders):
            if after[index] != before[index]:
                _fresh(folder, template)
                before[index] = _state(folder)
    assert not differences, f"{len(differences)} differences\n" + "\n".join(differences)

"""Two sides that run the same commands: QEMU's tools as processes, and the drop-in ones in this process. And the scenes that they play."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cowhand.cli.compat import img, io as io_tool, nbd as nbd_tool, profiles
from tests.tools.patience import PATIENCE
from tests.tools.programs import ATTEMPTS, UNSTEADY_CLOCK, find, installed_profile

SCENES = Path(__file__).parent / "scenes"
TOOLS = {"qemu-img": img.main, "qemu-io": io_tool.main, "qemu-nbd": nbd_tool.main}
_CONDITION = re.compile(r"(since|before|except) (\d+(?:\.\d+)*) ")
_ESCAPES = {"\\n": "\n", "\\t": "\t"}

#: What differs from run to run, or with how a file system counts blocks.
_VARIABLE = (
    (re.compile(r"\d+ ops; [0-9:. a-z]*\([^)]*\)"), "OPERATIONS"),
    (re.compile(r"^(\d+),1,[0-9:.]+,[0-9.]+,[0-9.]+$", re.MULTILINE), r"\1,TERSE"),
    (re.compile(r"Run completed in [0-9.]+ seconds"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "DATE"),
    (re.compile(r'("date-n?sec"|"actual-size"): \d+'), r"\1: N"),
    # GLib's own complaints about QEMU.
    (re.compile(r"(?m)^[\w-]+: GLib: .*\n"), ""),
    # How far a file reaches differs with what is written at once.
    (re.compile(r"(?m)^( *image: blk\w+:.*\n *file format: \w+\n *virtual size: ).*$"), r"\1N"),
    (re.compile(r"(?m)^( *image: blk\w+:.*\n *file format: \w+\n *virtual size: ).*$"), r"\1N"),
    (re.compile(r"file length: [0-9.]+ [KMG]?i?B(?: \(\d+ bytes\)|\b)"), "file length: N"),
    (
        re.compile(r'"virtual-size": \d+(?=,\s*"filename": "[^"\n]*",\s*"format": "(?:file|blkdebug)")'),
        '"virtual-size": N',
    ),
    (re.compile(r"#block\d+"), "#blockN"),
    (re.compile(r"disk size: [0-9.]+ [KMG]?i?B"), "disk size: N"),
    (re.compile(r"(WARNING: Image format was not specified for [^\n]*\n[^\n]*\n[^\n]*\n)\1"), r"\1"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did, without what may differ."""

    status: int
    out: str
    err: str


def without_variable(text: str) -> str:
    """Return *text* with what may differ replaced."""
    for pattern, replacement in _VARIABLE:
        text = pattern.sub(replacement, text)
    # QEMU ends these hints without a line end.
    return re.sub(r"(Detected format of \w+\.|on the image file to fix\.)(?=\Z|qemu|Leaked)", r"\1\n", text)


def run_real(words: list[str], folder: Path, stdin: str = "") -> Outcome:
    """Run QEMU's tool."""
    path = find(words[0])
    assert path is not None
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            words,  # under its plain name: that is what hints begin with
            executable=path,
            cwd=folder,
            input=os.fsencode(stdin),
            capture_output=True,
            timeout=PATIENCE,
            env={**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
        )
        if done.returncode == 0 or UNSTEADY_CLOCK not in os.fsdecode(done.stderr):
            break
    return Outcome(
        done.returncode, without_variable(os.fsdecode(done.stdout)), without_variable(os.fsdecode(done.stderr))
    )


def run_own(words: list[str], folder: Path, stdin: str = "") -> Outcome:
    """Run the drop-in tool in this process, under QEMU's name."""
    before = os.getcwd()
    saved = sys.stdin, sys.stdout, sys.stderr
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with (folder.parent / "stdin").open("w+") as given:
        given.write(stdin)
        given.seek(0)
        sys.stdin, sys.stdout, sys.stderr = given, out, err
        os.chdir(folder)
        try:
            status = TOOLS[words[0]](words)
        finally:
            os.chdir(before)
            sys.stdin, sys.stdout, sys.stderr = saved
    return Outcome(status, _text_of(out), _text_of(err))


def _text_of(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return without_variable(os.fsdecode(stream.buffer.read()))


def _prepare(words: list[str], folder: Path) -> Outcome:
    """Do one of the few commands that are not a tool's: on files, the same on both sides."""
    name, *arguments = words
    out = ""
    if name == "copy":
        shutil.copy(folder / arguments[0], folder / arguments[1])
    elif name == "truncate":
        os.truncate(folder / arguments[0], int(arguments[1]))
    elif name == "poke":
        with (folder / arguments[0]).open("r+b") as file:
            file.seek(int(arguments[1], 0))
            file.write(bytes.fromhex(arguments[2]))
    elif name == "text":
        (folder / arguments[0]).write_text("".join(arguments[1:]).replace("\\n", "\n"))
    elif name == "link":
        (folder / arguments[1]).symlink_to(arguments[0])
    elif name == "folder":
        (folder / arguments[0]).mkdir()
    elif name == "remove":
        (folder / arguments[0]).unlink()
    elif name == "size":
        out = str((folder / arguments[0]).stat().st_size)
    else:
        raise AssertionError(f"no command {name}")
    return Outcome(0, out, "")


def play(line: str, folder: Path, *, real: bool) -> Outcome:
    """Run one line of a scene in *folder*."""
    words = shlex.split(line)
    stdin = ""
    if words[0] == "input":
        stdin, words = words[1].replace("\\n", "\n"), words[2:]
    if words[0] not in TOOLS:
        return _prepare(words, folder)
    return run_real(words, folder, stdin) if real else run_own(words, folder, stdin)


def lines(scene: Path) -> Iterator[str]:
    """Yield the commands of a scene, without those that the installed version is said to answer otherwise.

    A line may begin with ``since VERSION``, ``before VERSION`` or ``except VERSION``, of profiles; several may follow each other.
    """
    profile = profiles.number(installed_profile())
    for line in scene.read_text().splitlines():
        taken = True
        while (match := _CONDITION.match(line)) is not None:
            version, line = profiles.number(match[2]), line[match.end() :]
            taken = (
                taken
                and {"since": profile >= version, "before": profile < version, "except": profile != version}[match[1]]
            )
        if taken and line.strip() and not line.startswith("#"):
            yield line


def scenes() -> list[Path]:
    """Return all scenes."""
    return sorted(SCENES.glob("*.scene"))

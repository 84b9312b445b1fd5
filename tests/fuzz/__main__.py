"""Coverage-guided fuzzing: ``python -m tests.fuzz run|replay|seeds``.

*run* fuzzes each target for ``--seconds``, from the committed corpus, and keeps what it learns in build/fuzz; an input that is a finding lies
there with its traceback, as ``finding-…``, or as ``timeout-…``, ``oom-…`` or ``crash-…`` where it ended the process. *replay* does with single
files what the fuzzer does. *seeds* writes the first corpus again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz import seeds
from tests.fuzz.targets import TARGETS, load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
#: Of wall-clock time, for one input: what hangs without using the processor. Budgets of processor time are the steps' (budget.py).
_HANG_SECONDS = 120
#: Inputs of the corpus that fuzzing does not begin with: changes of them would take most of its time.
_SLOW = "slow-"
_STATUS = re.compile(r"^#(\d+)\s.*\bcov: (\d+)", re.MULTILINE)


def run(name: str, seconds: int) -> int:
    """Fuzz one target, beginning again where the process dies; return the number of findings."""
    folders = {kind: BUILD / name / kind for kind in ("corpus", "findings", "seeds")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for path in (HERE / "corpus" / name).iterdir():
        if not path.name.startswith(_SLOW):
            (folders["seeds"] / path.stem).write_bytes(load(path))
    log = BUILD / name / "log.txt"
    before, started, inputs, edges = os.times(), time.monotonic(), 0, 0
    while (left := seconds - (time.monotonic() - started)) >= 1:
        command = [
            sys.executable, "-m", "tests.fuzz.target", name, str(folders["findings"]),
            f"-max_total_time={left:.0f}", f"-timeout={_HANG_SECONDS}", "-rss_limit_mb=2048", f"-max_len={TARGETS[name].max_bytes}",
            "-len_control=0", f"-artifact_prefix={folders['findings']}/", str(folders["corpus"]), str(folders["seeds"]),
        ]  # fmt: skip
        with log.open("wb") as file:
            done = subprocess.run(command, cwd=ROOT, check=False, stdout=file, stderr=subprocess.STDOUT)
        text = log.read_text(errors="replace")
        statuses = [(int(count), int(covered)) for count, covered in _STATUS.findall(text)]
        inputs += max((count for count, _ in statuses), default=0)
        edges = max([edges, *(covered for _, covered in statuses)])
        if done.returncode:
            print(
                f"{name}: the process ended with {done.returncode}:\n" + "\n".join(text.splitlines()[-12:]), flush=True
            )
            if time.monotonic() - started < 5:
                return 1
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    wall = time.monotonic() - started
    print(f"{name}: {wall:.0f} s, of processor time {cpu:.0f} s; {inputs} inputs, {edges} edges covered")
    _judge(name, folders["findings"])
    # What is slow still was judged: it is slow for the instruments.
    found = [path.name for path in sorted(folders["findings"].iterdir()) if not path.name.startswith("slow-")]
    found = [path for path in found if not path.endswith(".txt")]
    print(f"{name}: {len(found)} findings: {' '.join(found) or 'none'}", flush=True)
    return len(found)


def _judge(name: str, folder: Path) -> None:
    """Judge without the instruments, whose own time and memory count otherwise, what took long or met the process's limit of memory."""
    for path in sorted([*folder.glob("slow-*"), *folder.glob("oom-*")]):
        if path.suffix == ".txt":
            continue
        command = [sys.executable, "-m", "tests.fuzz", "replay", "--target", name, str(path)]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        print(f"{name}: {path.name}: {(done.stdout + done.stderr).strip().splitlines()[-1:]}", flush=True)
        kind, _, rest = path.name.partition("-")
        path.rename(folder / (f"finding-{kind}-{rest}" if done.returncode else f"slow-{rest}"))


def main() -> int:
    """Return 0 where nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("action", choices=("run", "replay", "seeds"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    options = parser.parse_intermixed_args()
    names = options.target or list(TARGETS)
    if options.action == "seeds":
        for name in names:
            print(name, seeds.write(name, HERE / "corpus" / name), "inputs")
        return 0
    if options.action == "replay":
        for path in options.files:
            print(path, TARGETS[names[0]].exercise(load(path)))
        return 0
    return int(sum(run(name, options.seconds) for name in names) > 0)


if __name__ == "__main__":
    raise SystemExit(main())

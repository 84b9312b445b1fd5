"""Coverage-guided fuzzing of images: ``python -m tests.fuzz run|replay|seeds``.

*run* fuzzes for ``--seconds``, from the committed corpus, and keeps what it learns in build/fuzz; an input that is a finding lies there as
``crash-…``, ``timeout-…`` or ``oom-…``. *replay* does with single files what the fuzzer does. *seeds* writes the first corpus again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
DRIVERS = ("qcow2",)


def run(driver: str, seconds: int, limit: int) -> int:
    """Fuzz one driver; return the number of findings."""
    learnt, findings = BUILD / driver / "corpus", BUILD / driver / "findings"
    for folder in (learnt, findings):
        folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "tests.fuzz.target", driver,
        f"-max_total_time={seconds}", f"-timeout={limit}", "-rss_limit_mb=1024", "-max_len=65536", "-len_control=0",
        f"-artifact_prefix={findings}/", "-print_final_stats=1", str(learnt), str(HERE / "corpus" / driver),
    ]  # fmt: skip
    before = os.times()
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, check=False)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    # Slow units are libFuzzer's notes on what took long but ended within the limit.
    found = sorted(path.name for path in findings.iterdir() if not path.name.startswith("slow-unit"))
    print(f"{driver}: {time.monotonic() - started:.0f} s, of processor time {cpu:.0f} s, ended with {done.returncode}")
    print(f"{driver}: {len(found)} findings: {' '.join(found) or 'none'}")
    return len(found) or int(done.returncode != 0)


def main() -> int:
    """Return 0 where nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("action", choices=("run", "replay", "seeds"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--driver", action="append", choices=DRIVERS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--limit", type=int, default=10, help="seconds for one input (default 10)")
    options = parser.parse_args()
    drivers = options.driver or list(DRIVERS)
    if options.action == "seeds":
        from tests.fuzz import seeds

        print(seeds.write(HERE / "corpus" / "qcow2"), "images")
        return 0
    if options.action == "replay":
        from tests.fuzz.exercise import exercise

        for path in options.files:
            print(path, exercise(path.read_bytes(), drivers[0]))
        return 0
    return int(sum(run(driver, options.seconds, options.limit) for driver in drivers) > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Random images with all options, judged by QEMU: ``python -m tests.soak [--seconds N] [--seed N]``.

Runs one image after another, each from a seed of its own, until the time is over; ends at the first that is wrong, says its seed and keeps its files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from cowhand.crypto import secrets
from tests.soak.choice import PASSPHRASE, SECRET
from tests.soak.soak import Image


def main() -> int:
    """Return 0 where everything was as it has to be."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--seed", type=int, help="the first image's; by default from the clock")
    parser.add_argument("--images", type=int, help="end after so many")
    options = parser.parse_args()
    first = int(time.time()) if options.seed is None else options.seed
    began, seen, requests = time.monotonic(), Counter[str](), 0
    number = 0
    with secrets.given({SECRET: PASSPHRASE}):
        while time.monotonic() - began < options.seconds and (options.images is None or number < options.images):
            folder = Path(tempfile.mkdtemp(prefix="cowhand-soak-"))
            try:
                image = Image(folder, first + number)
                requests += image.run()
            except Exception:  # noqa: BLE001 whatever it is, it is told with the seed
                traceback.print_exc()
                print(f"wrong: seed {first + number}, files in {folder}", file=sys.stderr)
                return 1
            shutil.rmtree(folder)
            seen.update(f"{key}={value}" for key, value in image.choice.options.items() if "key-secret" not in key)
            number += 1
    cpu = sum(os.times()[:4])
    print(
        f"{number} images from seed {first}, {requests} requests, {time.monotonic() - began:.0f} s, of processor time {cpu:.0f} s"
    )
    print("of these: " + ", ".join(f"{count} {name}" for name, count in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

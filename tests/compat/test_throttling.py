"""Throttle groups of the tools' command lines, with a clock that only waiting moves: every limit of QEMU's gives the rate that it names."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import pytest

from cowhand.block.filters.throttle import groups
from cowhand.block.filters.throttle.groups import ThrottleGroup
from tests.compat.sides import run_own


class Clock:
    """Time that passes while somebody waits."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        assert seconds is not None and seconds > 0
        self.time += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give every group that is made from now on the same slow clock."""
    clock = Clock()
    made = functools.partial(ThrottleGroup, now=clock.now, wait=clock.wait)
    monkeypatch.setattr(groups, "ThrottleGroup", made)
    return clock


def seconds(folder: Path, clock: Clock, limits: str, *commands: str) -> float:
    """Return how long the I/O tool takes for *commands* over a group of these *limits*."""
    path = folder / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    image = "driver=throttle,throttle-group=limited,file.driver=raw,file.file.filename=disk.raw"
    words = [word for command in commands for word in ("-c", command)]
    before = clock.time
    # Write-back: a flush is not limited, and there is no need to wait for the medium.
    options = ["-t", "writeback", "--object", f"throttle-group,id=limited,{limits}", "--image-opts"]
    outcome = run_own(["qemu-io", *options, *words, image], folder)
    assert (outcome.status, outcome.err) == (0, "")
    return clock.time - before


READ, WRITE, ZERO, DISCARD = "read -q 0 4k", "write -q 0 4k", "write -q -z 0 4k", "discard -q 0 4k"


@pytest.mark.parametrize("prefix", ["x-", "limits."])
@pytest.mark.parametrize(
    ("limits", "slow", "fast"),
    [
        (("iops-total=10",), (READ, WRITE, ZERO, DISCARD), ()),
        (("iops-read=10",), (READ,), (WRITE, DISCARD)),
        (("iops-write=10",), (WRITE, ZERO), (READ,)),
        (("bps-total=40960",), (READ, WRITE), ()),
        (("bps-read=40960",), (READ,), (WRITE, ZERO)),
        (("bps-write=40960",), (WRITE, DISCARD), (READ,)),
        (("iops-total=40", "iops-size=1024"), (READ, WRITE), ()),  # each counts as four
        (("iops-read=10", "bps-read=1000000"), (READ,), (WRITE,)),  # the stricter one
    ],
)
def test_every_limit_holds(
    tmp_path: Path, clock: Clock, prefix: str, limits: tuple[str, ...], slow: tuple[str, ...], fast: tuple[str, ...]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    given = ",".join(prefix + limit for limit in limits)
    count = 30
    commands = [slow[number % len(slow)] for number in range(count)]
    # Ten a second, but for what passes at once: a tenth of a second's worth, and the request that fills it too full.
    assert count / 10 - 0.3 <= seconds(folder, clock, given, *commands) <= count / 10
    if fast:
        assert seconds(folder, clock, given, *(fast * count)) == 0


def test_a_burst_passes_and_then_the_average_holds(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    limits = "x-iops-total=10,x-iops-total-max=20,x-iops-total-max-length=3"
    # The burst is worth 20 * 3 requests, at no more than 20 a second; what comes after it has the average.
    assert 2.5 <= seconds(folder, clock, limits, *[READ] * 60) <= 6.1
    whole = seconds(folder, clock, limits, *[READ] * 160)
    assert 9.5 <= whole <= 11.5


def test_the_images_of_a_group_share_its_limits(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "other.raw").write_bytes(bytes(1 << 20))
    reopened = "open driver=throttle,throttle-group=limited,file.driver=raw,file.file.filename=other.raw"
    assert 2.5 <= seconds(folder, clock, "x-iops-total=10", *[READ] * 15, "close", reopened, *[READ] * 15) <= 3.1

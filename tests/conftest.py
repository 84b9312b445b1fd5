"""What every test gets: ranked locks that check their order, a seeded generator, and no leftovers."""

from __future__ import annotations

import gc
import os
import random
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cowhand.cli.compat import profiles
from cowhand.core import locks
from tests import failures
from tests.failures import pytest_runtest_makereport as pytest_runtest_makereport
from tests.tools import programs

#: Threads that a library keeps for the life of the process; nothing of cowhand's belongs here.
_LASTING = ("execnet-", "Dummy-")
_GRACE_SECONDS = 30.0

failures.forget_ci()
# How long an example takes says nothing on a machine under load.
settings.register_profile(
    "cowhand", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("cowhand")
locks.enforce()
# Processes that tests start keep their compiled bytecode, whatever the caller's surroundings say: to compile the sources takes longer than most
# commands run.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# The drop-in tools answer as the QEMU that is installed here, whatever this machine's user has set.
os.environ[profiles.VARIABLE] = programs.installed_profile()


@pytest.fixture(autouse=True, scope="session")
def no_neighbours(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the folders of tests be no neighbours: where everyone may write and nobody may delete what is another's, as in /tmp, none are."""
    base = tmp_path_factory.getbasetemp()
    base.chmod(base.stat().st_mode | stat.S_ISVTX)


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    """Return an empty folder for images."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Return a generator seeded by the test's name; COWHAND_SEED=N gives other, equally repeatable, sequences."""
    seed = zlib.crc32(request.node.nodeid.encode()) ^ int(os.environ.get("COWHAND_SEED", "0"))
    request.node.add_report_section("setup", "seed", f"seed {seed}")
    return random.Random(seed)


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.name.startswith(_LASTING)}


def _children() -> set[int]:
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
    except OSError:  # not Linux, a thread that just ended, or a kernel without the file
        return set()


def _descriptors_below(folder: Path) -> list[str]:
    found = []
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return []
    for name in names:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(f"{folder}/"):
            found.append(target)
    return found


@pytest.fixture(autouse=True)
def no_leftovers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread, a child process, or an open file of its temporary folder behind."""
    folder: Path | None = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    threads, children = _threads(), _children()
    yield
    deadline = time.monotonic() + _GRACE_SECONDS
    while True:
        left = [f"thread {thread.name}" for thread in _threads() - threads if thread.is_alive()]
        left += [f"process {pid}" for pid in _children() - children]
        left += [f"open file {path}" for path in _descriptors_below(folder)] if folder is not None else []
        if not left:
            return
        if time.monotonic() > deadline:
            pytest.fail("left behind: " + ", ".join(sorted(left)))
        gc.collect()
        time.sleep(0.02)

"""Where the file ends after first writes, and reads there while it grows."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

import cowhand
from tests.tools.qemu import qemu_img, require_qemu

pytestmark = [require_qemu]


def data_end(path: Path) -> int:
    rows = json.loads(qemu_img("map", "-U", "--output=json", path).stdout)
    return max(int(row["offset"] + row["length"]) for row in rows if row["data"])


@pytest.mark.parametrize("options", [{"cluster_size": 65536}, {"cluster_size": 2 << 20}, {"extended_l2": True}])
@pytest.mark.parametrize("batch", [False, True])
def test_the_file_holds_the_whole_last_cluster(tmp_path: Path, options: dict[str, object], batch: bool) -> None:
    path = tmp_path / "a.qcow2"
    cowhand.create(path, "qcow2", 64 << 20, options=options)
    with cowhand.open(path, writable=True) as disk:
        if batch:
            disk.submit([(1, at << 20, b"x" * 700) for at in (3, 9, 12, 30)])
        else:
            disk.write(3 << 20, b"x" * 700)
            disk.write(9 << 20, b"x" * 5000)
        disk.flush()
        assert path.stat().st_size >= data_end(path)
        disk.write(40 << 20, b"y" * 100)
    assert path.stat().st_size >= data_end(path)
    with cowhand.open(path) as disk:
        assert disk.read((40 << 20) - 50, 200) == bytes(50) + b"y" * 100 + bytes(50)


def test_reading_the_last_cluster_while_the_file_grows(tmp_path: Path) -> None:
    path, cluster, count = tmp_path / "a.qcow2", 65536, 600
    cowhand.create(path, "qcow2", count * cluster)
    newest, failures, done = [-1], [], threading.Event()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with cowhand.open(path, writable=True) as disk:

            def read() -> None:
                while not done.is_set():
                    at = newest[0]
                    if at >= 0:
                        try:
                            assert disk.read(at * cluster, cluster) == b"x" * 512 + bytes(cluster - 512)
                        except Exception as error:  # noqa: BLE001 - told to the test
                            failures.append(error)
                            return

            threads = [threading.Thread(target=read) for _ in range(2)]
            for thread in threads:
                thread.start()
            for number in range(count):
                disk.write(number * cluster, b"x" * 512)
                newest[0] = number
            done.set()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failures == []

"""Block devices under the tools: both sides say the same of what keeps its size."""

from __future__ import annotations

from pathlib import Path

from tests.block.test_file import loop_device
from tests.compat.sides import run_own, run_real
from tests.tools.qemu import require_qemu


@require_qemu
def test_a_device_keeps_its_size(tmp_path: Path) -> None:
    with loop_device(tmp_path, 512, 1 << 20) as device:
        for words in (
            ["qemu-img", "resize", "-f", "raw", device, "+1M"],
            ["qemu-img", "resize", "-f", "raw", "--shrink", device, "512k"],
            ["qemu-img", "create", "-f", "raw", device, "2M"],
            ["qemu-io", "-f", "raw", "-c", "truncate 512k", "-c", "truncate 2M", "-c", "length", device],
        ):
            assert run_own(words, tmp_path) == run_real(words, tmp_path)

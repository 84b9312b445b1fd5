"""Random lives of qcow2 images in files, compared step by step with a model, and checked by the tests' own reader and by QEMU."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

import cowhand
from cowhand.block.disk import Disk
from cowhand.image.create import create
from cowhand.testing.machine import DiskMachine, Draw, machine_settings, pattern
from cowhand.testing.model import DiskModel, compare
from tests.qcow2 import images, oracle
from tests.tools.qemu import assert_clean, qemu_img, require_qemu


class Qcow2Machine(DiskMachine):
    """An image in a file, over at most two backing files."""

    versions = (2, 3)
    clusters = (512, 1024, 4096, 65536)
    depths = (0, 0, 1, 2)
    largest = 768 << 10

    def create(self, draw: Draw) -> DiskModel:
        version = self.version = draw(st.sampled_from(self.versions))
        self.unit = draw(st.sampled_from(self.clusters))
        bits = draw(st.sampled_from((1, 2, 4, 8, 16, 32, 64))) if version > 2 else 16
        self.snapshots = images.SNAPSHOTS and bits >= 4
        size = draw(st.integers(1, 512)) * 512
        options = {"compat": "0.10" if version == 2 else "1.1", "cluster_size": str(self.unit)}
        if version > 2:
            options["refcount_bits"] = str(bits)
        self.caching = draw(st.sampled_from(({}, {}, {"l2-cache-size": "2k", "refcount-cache-size": "2k"})))
        depth = draw(st.sampled_from(self.depths))
        self.backing = self._backing(depth, draw) if depth else b""
        self.path = self.folder / "disk.qcow2"
        below = {"backing": f"base{depth}", "backing_format": "qcow2" if depth > 1 else "raw"} if depth else {}
        create(self.path, "qcow2", size, options, **below)
        return DiskModel(size, self.backing)

    def _backing(self, depth: int, draw: Draw) -> bytes:
        """Make base1 (raw) and, for a depth of 2, base2 (qcow2) over it; return what shows through the top one."""
        content = pattern(200, draw(st.integers(1, 700)) * 512)
        (self.folder / "base1").write_bytes(content)
        if depth == 1:
            return content
        model = DiskModel(draw(st.integers(1, 700)) * 512, content)
        create(
            self.folder / "base2", "qcow2", model.size, {"cluster_size": "1024"}, backing="base1", backing_format="raw"
        )
        with cowhand.open(self.folder / "base2", writable=True, format="qcow2") as disk:
            for seed in range(201, 206):
                length = min(model.size, draw(st.sampled_from((512, 1500, 9000))))
                offset = draw(st.integers(0, model.size - length))
                disk.write(offset, pattern(seed, length))
                model.write(offset, pattern(seed, length))
            disk.write_zeroes(0, min(model.size, 3000))
            model.write_zeroes(0, min(model.size, 3000))
        return bytes(model.content)

    def open(self, writable: bool = True) -> Disk:
        return cowhand.open(self.path, writable=writable, format="qcow2", options=self.caching)

    def may_grow(self) -> bool:
        # Version 2 does not say how large the disk of a snapshot was, so QEMU and the driver refuse.
        return self.version > 2 or not self.model.snapshots

    def examine(self) -> None:
        image = oracle.Image(self.path.read_bytes(), self.backing)
        findings = image.check()
        assert findings.corruptions == []
        assert findings.flags + findings.lost_flags == []
        compare(bytes(self.model.content), image.content(), "the image in the file")
        assert {s.name for s in image.snapshots} == set(self.model.snapshots)
        for snapshot in image.snapshots:
            compare(
                self.model.snapshots[snapshot.name], image.content(snapshot), f"snapshot {snapshot.name} in the file"
            )
        if self.disk is None:
            # Closed in order: nothing is left over either.
            assert findings.leaks + findings.leaks_behind == []
            self.examine_closed()

    def examine_closed(self) -> None:
        """Look at the closed image with other programs."""

    def snapshot_create(self, name: str) -> None:
        images.snapshot_create(self.live, name)

    def snapshot_apply(self, name: str) -> None:
        images.snapshot_apply(self.live, name)

    def snapshot_delete(self, name: str) -> None:
        images.snapshot_delete(self.live, name)

    def snapshot_read(self, name: str) -> bytes:
        return images.snapshot_read(self.live, name)


class QemuMachine(Qcow2Machine):
    """The same, judged by qemu-img at the end."""

    def examine_closed(self) -> None:
        assert_clean(self.path)
        raw = self.folder / "model.raw"
        raw.write_bytes(self.model.content)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", self.path, raw)
        for number, (name, content) in enumerate(sorted(self.model.snapshots.items())):
            out = self.folder / f"snapshot{number}"
            qemu_img("convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "raw", self.path, out)
            # qemu-img gives it the size that the disk has now.
            found = out.read_bytes()
            common = min(len(found), len(content))
            compare(content[:common], found[:common], f"snapshot {name}, read by qemu-img")


class WritethroughMachine(Qcow2Machine):
    """Every request is stable when it returns, with direct writes to the file's tables after each."""

    def open(self, writable: bool = True) -> Disk:
        return cowhand.open(self.path, writable=writable, format="qcow2", cache="writethrough", options=self.caching)


TestModel = Qcow2Machine.TestCase
TestModel.settings = machine_settings(examples=250, steps=40)

TestWritethrough = WritethroughMachine.TestCase
TestWritethrough.settings = machine_settings(examples=40, steps=30)

TestQemu = pytest.mark.interop(require_qemu(QemuMachine.TestCase))
TestQemu.settings = machine_settings(examples=60, steps=30)

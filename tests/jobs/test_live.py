"""Jobs over a disk that eight threads write: what the target holds is one moment, or the present; nothing that was written is lost."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import BlockNode, walk
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import Cancelled, CowhandError, InvalidArgument, IOFailed, JobError, NodeBusy
from cowhand.drivers import REGISTRY
from cowhand.image.bitmaps import add_bitmap, clear_bitmap, find_bitmap
from cowhand.image.create import create
from cowhand.image.open import open_image
from cowhand.jobs.job import Job, JobListener, JobTable, OnError, Transaction
from cowhand.jobs.live.backup import BackupJob
from cowhand.jobs.live.commit import CommitJob
from cowhand.jobs.live.mirror import ActiveCommitJob, MirrorJob
from cowhand.jobs.live.stream import StreamJob
from cowhand.jobs.state import Status
from cowhand.testing.faults import FaultNode
from tests.block.disks import PATIENCE
from tests.block.test_graph_changes import SLICE, WRITERS, Writers, change_somewhere, files

SIZE = WRITERS * SLICE
ROUNDS = int(os.environ.get("COWHAND_JOB_ROUNDS", "6"))


class Events(JobListener):
    """Keeps what a job tells, as words."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def status_changed(self, job: Job, status: Status) -> None:
        self.seen.append(status.value)

    def ready(self, job: Job) -> None:
        self.seen.append("READY")

    def pending(self, job: Job) -> None:
        self.seen.append("PENDING")

    def completed(self, job: Job) -> None:
        self.seen.append("COMPLETED" + (f" {job.error.message}" if job.error is not None else ""))

    def cancelled(self, job: Job) -> None:
        self.seen.append("CANCELLED")

    def io_error(self, job: Job, operation: str, action: str, error: CowhandError) -> None:
        self.seen.append(f"ERROR {operation} {action}")


def content(disk: Disk) -> bytes:
    return disk.read(0, disk.size)


def node_of(path: Path) -> BlockNode:
    return Opening(REGISTRY).open(
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "discard": "unmap"}
    )


@pytest.fixture
def disk(image_dir: Path) -> Iterator[Disk]:
    with open_image(files(image_dir), writable=True) as disk:
        yield disk


def wait_for(job: Job, *states: Status) -> None:
    deadline = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if job.status in states:
            return
        deadline.wait(0.01)
    raise AssertionError(f"{job} did not become {states}")


class TestBackup:
    def test_the_target_holds_the_moment(self, disk: Disk, image_dir: Path, rng: random.Random) -> None:
        for number in range(ROUNDS):
            path = image_dir / f"backup{number}.qcow2"
            create(path, "qcow2", SIZE)
            writers = Writers(disk, rng.randrange(1 << 20))
            job = BackupJob("b", disk.root, node_of(path), target_is_zero=bool(number % 2))
            with graph.quiesce(disk.root):
                moment = content(disk)
                job.install()
            job.start()
            job.result(PATIENCE)
            writers.stop()
            with open_image(path) as copy:
                assert content(copy) == moment
        assert not any(node.driver == "copy-before-write" for node in walk((disk.root,)))

    def test_increments_make_each_moment(self, disk: Disk, image_dir: Path, rng: random.Random) -> None:
        add_bitmap(disk, "b0")
        create(image_dir / "full.qcow2", "qcow2", SIZE)
        full = BackupJob("full", disk.root, node_of(image_dir / "full.qcow2"))
        with graph.quiesce(disk.root):
            full.install()
            clear_bitmap(disk, "b0")
        full.start()
        full.result(PATIENCE)
        base = image_dir / "full.qcow2"
        for number in range(ROUNDS):
            path = image_dir / f"increment{number}.qcow2"
            create(path, "qcow2", backing=str(base), backing_format="qcow2")
            writers = Writers(disk, rng.randrange(1 << 20))
            with open_image(path, writable=True) as target:
                job = BackupJob("i", disk.root, target.root, sync="incremental", bitmap=find_bitmap(disk, "b0"))
                with graph.quiesce(disk.root):
                    moment = content(disk)
                    job.install()
                job.start()
                job.result(PATIENCE)
            writers.stop()
            with open_image(path) as copy:
                assert content(copy) == moment
            base = path

    def test_a_cancelled_increment_gives_the_bits_back(self, disk: Disk, image_dir: Path) -> None:
        bitmap = add_bitmap(disk, "b0")
        disk.write(0, b"x" * 100_000)
        before = bitmap.bits.sha256()
        create(image_dir / "t.qcow2", "qcow2", SIZE)
        events = Events()
        job = BackupJob(
            "i", disk.root, node_of(image_dir / "t.qcow2"), sync="incremental", bitmap=bitmap, listener=events
        )
        job.install()
        job.pause()
        job.start()
        wait_for(job, Status.PAUSED)
        job.cancel()
        with pytest.raises(Cancelled):
            job.result(PATIENCE)
        assert bitmap.bits.sha256() == before
        assert not bitmap.busy
        assert events.seen == ["running", "paused", "running", "aborting", "CANCELLED", "concluded", "null"]

    def test_two_disks_at_one_moment_end_together(self, image_dir: Path) -> None:
        disks = []
        for name in ("a", "b"):
            create(image_dir / f"{name}.qcow2", "qcow2", SIZE)
            create(image_dir / f"{name}-copy.qcow2", "qcow2", SIZE)
            disks.append(open_image(image_dir / f"{name}.qcow2", writable=True))
        stopped = threading.Event()

        def count() -> None:
            # The second disk is never ahead of the first.
            number = 0
            while not stopped.is_set():
                number += 1
                for disk in disks:
                    disk.write(0, number.to_bytes(8, "big"))

        from tests.block.disks import Worker

        worker = Worker(count)
        transaction = Transaction()
        jobs = [
            BackupJob(name, disk.root, node_of(image_dir / f"{name}-copy.qcow2"), transaction=transaction)
            for name, disk in zip("ab", disks, strict=True)
        ]
        with graph.quiesce(*(disk.root for disk in disks)):
            for job in jobs:
                job.install()
        for job in jobs:
            job.start()
        for job in jobs:
            job.result(PATIENCE)
        stopped.set()
        worker.done()
        values = []
        for name in "ab":
            with open_image(image_dir / f"{name}-copy.qcow2") as copy:
                values.append(int.from_bytes(copy.read(0, 8), "big"))
        assert values[0] - values[1] in (0, 1)
        for disk in disks:
            disk.close()

    def test_one_failure_aborts_the_transaction(self, disk: Disk, image_dir: Path) -> None:
        bitmap = add_bitmap(disk, "b0")
        create(image_dir / "good.qcow2", "qcow2", SIZE)
        other = Disk(MemoryNode(content=b"d" * SIZE), writable=True)
        fault = FaultNode(MemoryNode(content=bytes(SIZE)))
        fault.fail("write", 1)
        transaction = Transaction()
        good = BackupJob(
            "good", disk.root, node_of(image_dir / "good.qcow2"), sync="full", bitmap=bitmap, bitmap_mode="on-success",
            transaction=transaction,
        )  # fmt: skip
        bad = BackupJob("bad", other.root, fault, transaction=transaction)
        good.install()
        bad.install()
        good.start()
        wait_for(good, Status.WAITING, Status.RUNNING)
        bad.start()
        with pytest.raises(IOFailed):
            bad.result(PATIENCE)
        with pytest.raises(Cancelled):
            good.result(PATIENCE)
        assert not bitmap.busy
        other.close()

    def test_stop_on_error_tries_the_piece_again(self, image_dir: Path) -> None:
        source = Disk(MemoryNode(content=b"s" * SIZE), writable=True)
        fault = FaultNode(MemoryNode(content=bytes(SIZE)))
        fault.fail("write", 1)
        keeper = Disk(fault)
        events = Events()
        job = BackupJob("b", source.root, fault, listener=events, on_target_error=OnError.STOP)
        job.install()
        job.start()
        wait_for(job, Status.PAUSED)
        assert job.io_status == "failed"
        job.resume()
        job.result(PATIENCE)
        assert content(keeper) == b"s" * SIZE
        assert "ERROR write stop" in events.seen
        assert events.seen[-6:] == ["running", "waiting", "pending", "COMPLETED", "concluded", "null"]
        keeper.close()
        source.close()

    def test_the_filter_keeps_a_moment_to_read(self, disk: Disk, image_dir: Path, rng: random.Random) -> None:
        create(image_dir / "fence.qcow2", "qcow2", SIZE)
        job = BackupJob("f", disk.root, node_of(image_dir / "fence.qcow2"), sync="none")
        with graph.quiesce(disk.root):
            moment = content(disk)
            job.install()
        job.start()
        assert job.filter is not None
        view = Disk(Opening(REGISTRY).open({"driver": "snapshot-access", "file": job.filter}))
        writers = Writers(disk, rng.randrange(1 << 20))
        for _ in range(4):
            assert content(view) == moment
        writers.stop()
        assert content(view) == moment
        view.close()
        job.cancel()
        with pytest.raises(Cancelled):
            job.result(PATIENCE)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sync": "incremental"}, "must provide a valid bitmap name for 'incremental' sync mode"),
            ({"sync": "full", "bitmap_mode": "never"}, "Cannot specify bitmap sync mode without a bitmap"),
            ({"sync": "half"}, "Parameter 'sync' does not accept value 'half'"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, arguments: dict[str, Any], message: str) -> None:
        source, target = MemoryNode(content=bytes(SIZE)), MemoryNode(content=bytes(SIZE))
        with pytest.raises(InvalidArgument, match=message):
            BackupJob("b", source, target, **arguments)

    def test_sizes_must_agree_and_nodes_be_free(self, disk: Disk) -> None:
        with pytest.raises(InvalidArgument, match="Source and target image have different sizes"):
            BackupJob("b", disk.root, MemoryNode(content=bytes(512))).install()
        job = BackupJob("b", disk.root, MemoryNode(content=bytes(SIZE)), sync="none")
        source = disk.root
        job.install()
        with pytest.raises(NodeBusy, match="block device is in use by block job: backup"):
            BackupJob("c", source, MemoryNode(content=bytes(SIZE))).install()
        job.uninstall()
        assert disk.root is source


class TestMirror:
    @pytest.mark.parametrize("mode", ["background", "write-blocking"])
    def test_both_sides_are_the_same_and_the_users_go_over(
        self, disk: Disk, image_dir: Path, rng: random.Random, mode: str
    ) -> None:
        for number in range(ROUNDS):
            path = image_dir / f"mirror{number}.qcow2"
            create(path, "qcow2", SIZE)
            writers = Writers(disk, rng.randrange(1 << 20))
            old, target = disk.root, node_of(path)
            events = Events()
            job = MirrorJob("m", old, target, copy_mode=mode, target_is_zero=bool(number % 2), listener=events)
            job.install()
            job.start()
            wait_for(job, Status.READY)
            threading.Event().wait(0.05)
            job.complete()
            job.result(PATIENCE)
            assert disk.root is target
            assert old.closed
            writers.stop()
            assert events.seen == ["running", "ready", "READY", "waiting", "pending", "COMPLETED", "concluded", "null"]

    def test_a_ready_job_that_is_cancelled_leaves_a_copy(self, disk: Disk, image_dir: Path, rng: random.Random) -> None:
        create(image_dir / "copy.qcow2", "qcow2", SIZE)
        job = MirrorJob("m", disk.root, node_of(image_dir / "copy.qcow2"))
        source = disk.root
        job.install()
        writers = Writers(disk, rng.randrange(1 << 20))
        job.start()
        wait_for(job, Status.READY)
        writers.stop()
        job.cancel()
        job.result(PATIENCE)
        assert disk.root is source
        with open_image(image_dir / "copy.qcow2") as copy:
            assert content(copy) == content(disk)

    def test_a_forced_cancel_aborts(self, disk: Disk, image_dir: Path) -> None:
        create(image_dir / "copy.qcow2", "qcow2", SIZE)
        events = Events()
        job = MirrorJob("m", disk.root, node_of(image_dir / "copy.qcow2"), listener=events)
        job.install()
        job.start()
        wait_for(job, Status.READY)
        job.pause()
        wait_for(job, Status.STANDBY)
        job.cancel(force=True)
        with pytest.raises(Cancelled):
            job.result(PATIENCE)
        assert events.seen[-4:] == ["aborting", "CANCELLED", "concluded", "null"]
        disk.write(0, b"on it goes")

    def test_an_active_image_is_committed_under_writers(self, image_dir: Path, rng: random.Random) -> None:
        path = files(image_dir)
        opening = Opening(REGISTRY)
        opening.writable_layer = 1
        disk = Disk(opening.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}), writable=True)
        base = disk.root.children["backing"].node
        writers = Writers(disk, rng.randrange(1 << 20))
        job = ActiveCommitJob("c", disk.root, base)
        job.install()
        job.start()
        wait_for(job, Status.READY)
        job.complete()
        job.result(PATIENCE)
        assert disk.root is base
        writers.stop()
        disk.close()
        with open_image(image_dir / "base.qcow2") as again:
            for number, model in enumerate(writers.models):
                assert again.read(number * SLICE, SLICE) == model

    def test_different_sizes_are_a_failure_of_the_job(self, disk: Disk) -> None:
        job = MirrorJob("m", disk.root, MemoryNode(content=bytes(512)))
        job.install()
        job.start()
        with pytest.raises(InvalidArgument, match="Source and target image have different sizes"):
            job.result(PATIENCE)


def chain(folder: Path, depth: int, rng: random.Random) -> tuple[Path, bytes]:
    """Make *depth* images over one another, each with data of its own; return the top one and what it shows."""
    shown = bytearray(SIZE)
    path = folder / "layer0.qcow2"
    create(path, "qcow2", SIZE)
    for number in range(depth):
        if number:
            upper = folder / f"layer{number}.qcow2"
            create(upper, "qcow2", backing=str(path), backing_format="qcow2")
            path = upper
        with open_image(path, writable=True) as disk:
            for _ in range(12):
                offset = rng.randrange(SIZE - 100_000)
                data = rng.randbytes(rng.randrange(1, 100_000))
                if rng.random() < 0.2:
                    disk.write_zeroes(offset, len(data), unmap=True)
                    data = bytes(len(data))
                else:
                    disk.write(offset, data)
                shown[offset : offset + len(data)] = data
    return path, bytes(shown)


class TestStream:
    @pytest.mark.parametrize("onto", [None, 0, 1, 2])
    def test_an_image_stands_on_less_under_writers(self, image_dir: Path, rng: random.Random, onto: int | None) -> None:
        path, shown = chain(image_dir, 4, rng)
        with open_image(path, writable=True) as disk:
            assert content(disk) == shown
            layers = [node for node in walk((disk.root,)) if node.is_format][::-1]
            base = None if onto is None else layers[onto]
            writers = Writers(disk, rng.randrange(1 << 20))
            job = StreamJob("s", disk.root, base=base)
            job.install()
            job.start()
            job.result(PATIENCE)
            writers.stop()
            left = [node for node in walk((disk.root,)) if node.is_format]
            assert len(left) == 1 + (0 if onto is None else onto + 1)
        with open_image(path) as again:
            for number, model in enumerate(writers.models):
                assert again.read(number * SLICE, SLICE) == model

    def test_it_is_begun_anew_after_a_cancel(self, image_dir: Path, rng: random.Random) -> None:
        path, shown = chain(image_dir, 3, rng)
        with open_image(path, writable=True) as disk:
            job = StreamJob("s", disk.root, speed=1 << 20)
            job.install()
            job.start()
            threading.Event().wait(0.1)
            job.cancel()
            with pytest.raises(Cancelled):
                job.result(PATIENCE)
            assert content(disk) == shown
            again = StreamJob("s", disk.root)
            again.install()
            again.start()
            again.result(PATIENCE)
            assert disk.root.backing is None
            assert content(disk) == shown


class TestCommit:
    @pytest.mark.parametrize(("top", "base"), [(2, 1), (2, 0), (1, 0)])
    def test_layers_between_go_down_under_writers(
        self, image_dir: Path, rng: random.Random, top: int, base: int
    ) -> None:
        path, _ = chain(image_dir, 4, rng)
        with open_image(path, writable=True) as disk:
            layers = [node for node in walk((disk.root,)) if node.is_format][::-1]
            writers = Writers(disk, rng.randrange(1 << 20))
            job = CommitJob("c", layers[top], layers[base])
            job.install()
            job.start()
            job.result(PATIENCE)
            writers.stop()
            assert layers[top].closed
            assert not layers[base].writable
        with open_image(path) as again:
            for number, model in enumerate(writers.models):
                assert again.read(number * SLICE, SLICE) == model

    def test_the_active_image_is_told_apart(self, disk: Disk) -> None:
        backing = disk.root.backing
        assert backing is not None
        with pytest.raises(InvalidArgument, match="is an active image"):
            CommitJob("c", disk.root, backing.node).install()


def test_filters_come_and_go_while_jobs_run(disk: Disk, image_dir: Path, rng: random.Random) -> None:
    for number in range(ROUNDS):
        writers = Writers(disk, rng.randrange(1 << 20))
        inserted: list[BlockNode] = []
        paths = [image_dir / f"{name}{number}.qcow2" for name in ("backup", "mirror")]
        for path in paths:
            create(path, "qcow2", SIZE)
        backup = BackupJob("b", disk.root, node_of(paths[0]), speed=8 << 20)
        with graph.quiesce(disk.root):
            moment = content(disk)
            backup.install()
        backup.start()
        mirror = MirrorJob("m", disk.root, node_of(paths[1]))
        mirror.install()
        mirror.start()
        while not (backup.wait(0) and mirror.status is Status.READY):
            base = next(node for node in walk((disk.root,)) if node.is_format)
            change_somewhere(base, rng, inserted)
            if rng.random() < 0.2 and not backup.wait(0):
                try:
                    backup.pause()
                    threading.Event().wait(0.002)
                    backup.resume()
                except JobError:
                    pass  # it came to its end meanwhile
            assert mirror.error is None
        backup.result(PATIENCE)
        mirror.complete()
        mirror.result(PATIENCE)
        writers.stop()
        with open_image(paths[0]) as copy:
            assert content(copy) == moment


class TestStates:
    class Idle(Job):
        kind = "idle"

        def run(self) -> None:
            self.become_ready()
            while not self.completing:
                self.pause_point()
                self.cancel_token.wait(0.001)

    def test_verbs_are_refused_in_qemus_words(self) -> None:
        job = self.Idle("j", auto_finalize=False, auto_dismiss=False)
        with pytest.raises(JobError, match="Job 'j' in state 'created' cannot accept command verb 'complete'"):
            job.complete()
        job.start()
        wait_for(job, Status.READY)
        with pytest.raises(JobError, match="Can't resume a job that was not paused"):
            job.resume()
        job.pause()
        with pytest.raises(JobError, match="Job is already paused"):
            job.pause()
        wait_for(job, Status.STANDBY)
        job.resume()
        job.complete()
        wait_for(job, Status.PENDING)
        with pytest.raises(JobError, match="Job 'j' in state 'pending' cannot accept command verb 'pause'"):
            job.pause()
        job.finalize()
        job.result(PATIENCE)
        assert job.status is Status.CONCLUDED
        job.dismiss()
        assert job.status is Status.NULL

    @pytest.mark.parametrize("ident", ["", "9", "a b", "-x"])
    def test_names_follow_qemus_rule(self, ident: str) -> None:
        with pytest.raises(JobError, match=f"Invalid job ID '{ident}'"):
            self.Idle(ident)

    def test_the_table_is_newest_first_and_ends_all(self) -> None:
        table = JobTable()
        jobs = [self.Idle(name, auto_dismiss=False) for name in ("one", "two")]
        for job in jobs:
            table.add(job)
            job.start()
        assert table.all() == jobs[::-1]
        with pytest.raises(JobError, match="Job ID 'one' already in use"):
            table.add(self.Idle("one"))
        table.end_all()
        assert [job.status for job in jobs] == [Status.CONCLUDED] * 2
        with pytest.raises(JobError, match="Job not found"):
            table.get("three")

    def test_the_speed_is_kept(self) -> None:
        from cowhand.core import clock

        class Counting(Job):
            def run(self) -> None:
                for _ in range(5):
                    self.pause_point(1 << 20)

        job = Counting("s", speed=10 << 20)
        begin = clock.monotonic()
        job.start()
        job.result(PATIENCE)
        # A tenth of a second's worth may pass at once.
        assert clock.monotonic() - begin > 0.35

"""A random life of a small qcow2 image over a recorder, and the judgement of what a power failure left of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.node.node import WRITE_REQUEST, BlockNode, Request
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import InvalidArgument, UnsupportedFeature
from cowhand.core.extents import ALLOCATED
from cowhand.testing.expected import SECTOR, ContentLost, ExpectedContent
from cowhand.testing.model import compare
from cowhand.testing.nodes import in_threads
from cowhand.testing.recorder import RecorderNode
from cowhand.testing.replay import CrashState
from tests.qcow2 import images, oracle
from tests.qcow2.images import Shape

DIRTY = 1  #: incompatible feature bit: reference counts may be wrong


@dataclass(slots=True)
class _SnapshotLife:
    """When a snapshot was made and deleted, and what it holds."""

    name: str
    content: bytes
    made: tuple[int, int | None]
    deleted: tuple[int, int | None] | None = None

    def must_exist(self, moment: int) -> bool:
        return (
            self.made[1] is not None and self.made[1] < moment and (self.deleted is None or self.deleted[0] >= moment)
        )

    def may_exist(self, moment: int) -> bool:
        if self.made[0] >= moment:
            return False
        return self.deleted is None or self.deleted[1] is None or self.deleted[1] >= moment


@dataclass(slots=True)
class Verdicts:
    """What was seen on the way, so that a test can tell that it tested something."""

    states: int = 0
    leaking: int = 0
    stale_flags: int = 0
    used_on: int = 0
    repaired: int = 0
    stories: list[str] = field(default_factory=list)


class Life:
    """One image, its recorder, and what the guest may expect. :meth:`run` lives; :meth:`judge` looks at one crash."""

    def __init__(self, shape: Shape, rng: random.Random, *, sector: int = 1) -> None:
        self.shape = shape
        self.rng = rng
        self.base = shape.base(rng)
        start = rng.randbytes(shape.filled)
        image, *data = images.create_media(shape, start)
        self.key = images.key_of(image, shape)
        self.recorder = RecorderNode(image, sector=sector)
        self.log = self.recorder.log
        self.data = [RecorderNode(node, sector=sector, log=self.log) for node in data]
        # Hold the recorders open while the image above them is closed and opened again.
        self.keepers = [Disk(node) for node in (self.recorder, *self.data)]
        self.disk = self._open()
        self.size = shape.size
        self.expected = ExpectedContent(self.log, shape.size, start + self.base[len(start) : shape.size])
        self.snapshots: list[_SnapshotLife] = []
        self.reflagging: list[tuple[int, int]] = []  #: when an operation on snapshots was under way
        self.verdicts = Verdicts()
        self.steps: list[str] = []

    def _open(self) -> Disk:
        return self._open_over(self.recorder, self.data, cache=self.shape.cache)

    def _open_over(self, file: BlockNode, data: Sequence[BlockNode], cache: int = 0) -> Disk:
        return images.open_over(
            file,
            self._backing(),
            writable=True,
            cache=cache,
            data=data[0] if data else None,
            encrypted=bool(self.shape.encrypt),
        )

    def _backing(self) -> BlockNode | None:
        return MemoryNode(content=self.base) if self.shape.backed else None

    # -- living

    def run(self, steps: int) -> None:
        """Take *steps* random steps, and close the image."""
        verbs = [self.write] * 8 + [
            self.batch,
            self.zero,
            self.zero,
            self.discard,
            self.discard,
            self.flush,
            self.flush,
            self.flush,
        ]
        verbs += [self.reopen, self.grow]
        if not self.shape.data:
            verbs += [self.write_compressed, self.write_compressed]
        if self.shape.amended:
            verbs += [self.amend] * 4
        if self.shape.shrinks:
            verbs += [self.grow, self.shrink, self.shrink]
        if self.shape.snapshots:
            verbs += [self.snapshot, self.snapshot, self.apply, self.delete]
        for _ in range(steps):
            self.rng.choice(verbs)()
        self.finish()

    def run_threads(self, threads: int, steps: int) -> None:
        """Let several threads write, zero, discard and flush, each in its own part of the disk, and close the image."""
        share = self.size // threads // SECTOR * SECTOR
        # Parts do not end on clusters, so that neighbours meet in one.
        in_threads(
            [partial(self._live_in, n * share, share, steps, random.Random(self.rng.random())) for n in range(threads)]
        )
        self.finish()

    def _live_in(self, begin: int, share: int, steps: int, rng: random.Random) -> None:
        for _ in range(steps):
            length = min(share, rng.choice((SECTOR, self.shape.cluster, 3 * self.shape.cluster)))
            offset = begin + rng.randrange((share - length) // SECTOR + 1) * SECTOR
            action = rng.randrange(10)
            if action < 6:
                data = rng.randbytes(length)
                with self.expected.writing(offset, data):
                    self.disk.write(offset, data)
            elif action == 6:
                with self.expected.zeroing(offset, length):
                    self.disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            elif action == 7:
                with self.expected.discarding(offset, length):
                    self.disk.discard(offset, length)
            else:
                with self.expected.flushing():
                    self.disk.flush()

    def finish(self) -> None:
        """Close everything; what is left is the log."""
        with self.expected.flushing():
            self.disk.close()
        for keeper in self.keepers:
            keeper.close()

    def _place(self) -> tuple[int, int]:
        cluster = self.shape.cluster
        length = self.rng.choice((512, 512, cluster, cluster, 2 * cluster, 3 * cluster + 512, 8 * cluster))
        if self.shape.extended and self.rng.random() < 0.6:
            length = self.rng.choice((512, 1536, cluster // 32, cluster // 8, cluster // 2, cluster + 1024))
        length = min(length, self.size)
        offset = self.rng.randrange(self.size - length + 1)
        return offset - offset % self.rng.choice((512, cluster)), length

    def write(self) -> None:
        self.write_at(*self._place())

    def write_at(self, offset: int, length: int) -> None:
        fua = self.rng.random() < 0.1
        self._tell("write", offset, length)
        data = self.rng.randbytes(length)
        with self.expected.writing(offset, data, fua=fua):
            self.disk.write(offset, data, fua=fua)

    def batch(self) -> None:
        """Several writes at once, apart from one another."""
        room = self.size // 4 // 512 * 512
        self._tell("batch", 0, self.size)
        batch: list[Request] = []
        for quarter in range(4):
            length = self.rng.choice((512, self.shape.cluster))
            if self.shape.extended:
                length = self.rng.choice((512, self.shape.cluster // 32, self.shape.cluster // 8, self.shape.cluster))
            offset = quarter * room + self.rng.randrange((room - length) // 512 + 1) * 512
            batch.append((WRITE_REQUEST, offset, self.rng.randbytes(length)))
            behind = offset + length + self.rng.choice((0, 0, 512, 2048))
            if behind + 1024 <= (quarter + 1) * room:
                # Another one in the same cluster, mostly: adjoining, or not; with subclusters, in the same one, or in one that follows.
                batch.append((WRITE_REQUEST, behind, self.rng.randbytes(1024)))
        with ExitStack() as stack:
            for _, offset, data in batch:
                stack.enter_context(self.expected.writing(offset, data))
            self.disk.submit(batch)

    def write_compressed(self) -> None:
        """Store a cluster compressed, as convert and backups do, where none is."""
        cluster = self.shape.cluster
        offset = self.rng.randrange(self.size // cluster) * cluster
        node = self.disk.root
        assert isinstance(node, Qcow2Node)
        if node.map(offset, cluster)[1] & ALLOCATED:
            return
        self._tell("compressed", offset, cluster)
        data = (self.rng.randbytes(cluster // 8) * 8)[:cluster]
        payload = node.codec.compress(data)
        assert payload is not None
        with self.expected.writing(offset, data):
            node.write_compressed(offset, payload)

    def zero(self) -> None:
        offset, length = self._place()
        self._tell("zero", offset, length)
        with self.expected.zeroing(offset, length):
            self.disk.write_zeroes(offset, length, unmap=self.rng.random() < 0.5)

    def discard(self) -> None:
        offset, length = self._place()
        self._tell("discard", offset, length)
        with self.expected.discarding(offset, length):
            self.disk.discard(offset, length)

    def flush(self) -> None:
        self._tell("flush")
        with self.expected.flushing():
            self.disk.flush()

    def reopen(self) -> None:
        self._tell("reopen")
        with self.expected.flushing():
            self.disk.close()
        self.disk = self._open()

    def grow(self) -> None:
        if self.size >= 2 * self.shape.size or (self.version == 2 and self._living()):
            return  # version 2 does not say how large the disk of a snapshot was, so QEMU and the driver refuse
        size = self.size + self.rng.randrange(1, 65) * 512
        # An encrypted place that was never written holds what zeroes decrypt to.
        mode = "off" if self.shape.encrypt else self.rng.choice(("off", "metadata", "falloc"))
        self._tell(f"grow {mode}", 0, size)
        with self.expected.resizing(size):
            self.disk.resize(size, preallocation=mode)
        self.size = size

    def shrink(self) -> None:
        """Make the disk smaller: what goes may read as zeroes, or as the backing file, before the size has changed."""
        if self.size <= self.shape.size // 2 or (self.version == 2 and self._living()):
            return
        size = self.size - self.rng.randrange(1, self.size // 1024) * 512
        self._tell("shrink", 0, size)
        below = self.base[size : self.size].ljust(self.size - size, b"\0")
        with self.expected.writing(size, below, weak=True), self.expected.resizing(size):
            self.disk.resize(size, shrink=True)
        self.size = size

    def amend(self) -> None:
        """Change the image's form; what the disk holds stays."""
        node = self.disk.root
        assert isinstance(node, Qcow2Node)
        options: dict[str, object] = {"refcount_bits": self.rng.choice((8, 16, 32, 64))}
        if self.rng.random() < 0.5:
            options = {"compat": self.rng.choice(("0.10", "1.1")), "refcount_bits": 16}
        self._tell(f"amend {options}")
        with suppress(UnsupportedFeature, InvalidArgument):
            node.amend(options)

    @property
    def version(self) -> int:
        """The image's version now."""
        node = self.disk.root
        assert isinstance(node, Qcow2Node)
        return node.header.version

    def _living(self) -> list[_SnapshotLife]:
        return [snapshot for snapshot in self.snapshots if snapshot.deleted is None]

    def snapshot(self) -> None:
        if len(self._living()) >= 4:
            return
        self._tell("snapshot")
        name = f"s{len(self.snapshots)}"
        life = _SnapshotLife(name, self.disk.read(0, self.size), (self.log.now(), None))
        self.snapshots.append(life)
        with self.expected.flushing(), self._reflagging():
            images.snapshot_create(self.disk, name)
        life.made = (life.made[0], self.log.now())

    def apply(self) -> None:
        if not self._living():
            return
        chosen = self.rng.choice(self._living())
        self._tell("apply " + chosen.name)
        with self.expected.replacing(chosen.content), self._reflagging():
            images.snapshot_apply(self.disk, chosen.name)
        self.size = len(chosen.content)

    def delete(self) -> None:
        if not self._living():
            return
        chosen = self.rng.choice(self._living())
        self._tell("delete " + chosen.name)
        begin = self.log.now()
        chosen.deleted = (begin, None)
        with self._reflagging():
            images.snapshot_delete(self.disk, chosen.name)
        chosen.deleted = (begin, self.log.now())

    @contextmanager
    def _reflagging(self) -> Iterator[None]:
        begin = self.log.now()
        yield
        self.reflagging.append((begin, self.log.now()))

    def _tell(self, verb: str, offset: int = 0, length: int = 0) -> None:
        self.steps.append(f"{self.log.now()}: {verb} {offset:#x}+{length:#x}")

    # -- judging

    def judge(self, state: CrashState) -> None:
        """Raise unless the image that a crash left is sound but for leaks, and holds what was flushed."""
        self.verdicts.states += 1
        try:
            content = self._judge_bytes(state)
            if self.verdicts.states % 7 == 0:
                self._use_on(state, content)
        except Exception as error:
            before = [step for step in self.steps if int(step.split(":")[0]) < state.moment]
            error.add_note(f"{self.shape}; the guest's last steps: {'; '.join(before[-4:])}")
            raise

    def _image(self, file: MemoryNode, others: Sequence[MemoryNode]) -> oracle.Image:
        external = (node.snapshot_bytes() for node in others)
        return oracle.Image(file.snapshot_bytes(), self.base, *external, key=self.key)

    def _judge_bytes(self, state: CrashState) -> bytes:
        moment = state.moment
        image = self._image(state.image, state.others)
        busy = any(begin < moment <= end for begin, end in self.reflagging)
        if image.incompatible & DIRTY:
            # With lazy counts at any time; else only while counts and COPIED bits of many clusters change, which cannot be done at once.
            assert self.shape.lazy or busy
            image = self._repaired(state)
            findings = image.check()
            assert findings == oracle.Findings(leaks_behind=findings.leaks_behind), "the repair left something over"
        assert image.incompatible == 4 * bool(self.shape.data) + 16 * self.shape.extended
        findings = image.check()
        assert findings.corruptions == []
        self.verdicts.leaking += bool(findings.leaks + findings.leaks_behind)
        if findings.flags or findings.lost_flags:
            # Version 2 has no dirty bit. Nothing depends on these bits then.
            assert image.version == 2, findings.flags + findings.lost_flags
            assert busy, findings.flags + findings.lost_flags
            self.verdicts.stale_flags += 1
        return self._judge_content(image, moment)

    def _judge_content(self, image: Any, moment: int) -> bytes:
        """Return what the disk holds in *image*, after it and all snapshots were found to be what they may be at *moment*."""
        content: bytes = image.content()
        self.expected.check(content, moment)
        if self.shape.data == "raw":
            # Read by itself it is what the disk may be, too.
            assert image.external is not None
            self.expected.check(image.external[: len(content)].ljust(len(content), b"\0"), moment)
        listed = {snapshot.name: snapshot for snapshot in image.snapshots}
        for life in self.snapshots:
            found = listed.pop(life.name, None)
            if found is None:
                if life.must_exist(moment):
                    raise ContentLost(f"snapshot {life.name} is gone")
                continue
            if not life.may_exist(moment):
                raise ContentLost(f"snapshot {life.name} is there, but was not made yet or was deleted")
            compare(life.content, image.content(found), f"snapshot {life.name}")
            self._judge_state(life.name, image, found)
        assert listed == {}, "snapshots that nobody made"
        return content

    def _judge_state(self, name: str, image: Any, snapshot: Any) -> None:
        """Look at the VM state of the *snapshot* that is called *name*: these lives have none."""

    def _repaired(self, state: CrashState) -> oracle.Image:
        """Open for writing what is marked dirty, which has to repair it, and close it."""
        self.verdicts.repaired += 1
        nodes = [node.copy() for node in (state.image, *state.others)]
        keepers = [Disk(node) for node in nodes]
        self._open_over(nodes[0], nodes[1:]).close()
        for keeper in keepers:
            keeper.close()
        return self._image(nodes[0], nodes[1:])

    def _use_on(self, state: CrashState, content: bytes) -> None:
        """Open what is left and go on with it: it reads the same, and it and its snapshots stay sound."""
        self.verdicts.used_on += 1
        node = state.image
        kept = {s.name: self._content_of(s.name) for s in self._image(node, state.others).snapshots}
        keepers = [Disk(medium) for medium in (node, *state.others)]
        with self._open_over(node, state.others) as disk:
            compare(content, disk.read(0, disk.size), "the driver's reading of the image")
            model = bytearray(content)
            self._write_some(disk, model)
            if self.shape.snapshots:
                images.snapshot_create(disk, "after")
                kept["after"] = bytes(model)
                if len(kept) > 1 and self.rng.random() < 0.5:
                    gone = self.rng.choice(sorted(kept))
                    images.snapshot_delete(disk, gone)
                    del kept[gone]
                self._write_some(disk, model)
        for keeper in keepers:
            keeper.close()
        image = self._image(node, state.others)
        assert image.check().corruptions == []
        compare(bytes(model), image.content(), "the image after it was used on")
        assert {s.name for s in image.snapshots} == set(kept)
        for snapshot in image.snapshots:
            compare(
                kept[snapshot.name], image.content(snapshot), f"snapshot {snapshot.name} after the image was used on"
            )

    def _content_of(self, name: str) -> bytes:
        return next(snapshot.content for snapshot in self.snapshots if snapshot.name == name)

    def _write_some(self, disk: Disk, model: bytearray) -> None:
        for _ in range(4):
            length = min(self.rng.choice((512, self.shape.cluster, 4 * self.shape.cluster)), len(model))
            offset = self.rng.randrange(len(model) - length + 1)
            data = self.rng.randbytes(length)
            disk.write(offset, data)
            model[offset : offset + length] = data

"""Lives of drawn images over a recorder or a medium that fails: what a power failure or an error may leave of them.

The judge is ``tests/qcow2/oracle``, which learns zstd and bitmaps here. What an image had lost before may stay lost.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.block.format_io.compressed_writes import write_compressed
from cowhand.block.formats.qcow2.cluster.compression import codec
from cowhand.block.formats.qcow2.compact.compact import Compactor
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import CowhandError
from cowhand.core.extents import ALLOCATED
from cowhand.drivers import REGISTRY
from cowhand.image import bitmaps
from cowhand.image.check import check
from cowhand.jobs.commit import commit
from cowhand.testing.expected import ExpectedContent
from cowhand.testing.faults import FaultNode
from cowhand.testing.model import compare
from cowhand.testing.recorder import END_OF_LOG, RecorderNode
from cowhand.testing.replay import CrashState
from tests.foreign.bitmaps import AUTO, IN_USE
from tests.foreign.images import Image
from tests.qcow2 import images, life, oracle
from tests.qcow2.life import DIRTY

#: Images that are refused, of which nobody knows what they hold, or that this judge cannot follow.
STRANGE = {"unknown", "corrupt", "backing format", "size", "bitmap extra", "nameless"}
BITMAPS = 0x23852875


def suits(image: Image) -> bool:
    """Tell whether *image* is large enough for the verbs of a life, and small enough to be looked at a thousand times."""
    cluster, names = image.shape.cluster, [snapshot.name for snapshot in image.snapshots]
    return (
        not STRANGE & image.odd
        and max(8192, 6 * cluster) <= image.size <= 400_000
        and image.path.stat().st_size <= 1 << 20
        and len(set(names)) == len(names)
    )


class Stored(NamedTuple):
    """A bitmap as the directory has it."""

    name: bytes
    flags: int
    bits: int
    table: int
    entries: int


class Judged(oracle.Image):
    """The independent reader, with zstd and with the references of bitmaps."""

    def _cluster(self, entry: int, guest: int) -> bytes | None:
        if entry & oracle.COMPRESSED and self.incompatible & 8:
            offset, length = self._compressed(entry)
            found = bytearray(self.cluster)
            codec(1).decompress_into(self.data[offset : offset + length], memoryview(found))
            return bytes(found)
        return super()._cluster(entry, guest)

    def _walk(self, what: str, l1_offset: int, l1_size: int, *, active: bool) -> None:
        found = list(self.bitmaps()) if active else []
        if found:
            self._refer("bitmap directory", *self.directory)
        for number, bitmap in enumerate(found):
            self._refer(f"bitmap table {number}", bitmap.table, 8 * bitmap.entries)
            for index, word in enumerate(self.words(bitmap.table, bitmap.entries)):
                if word & oracle.OFFSET:
                    self._refer(f"bitmap {number}:{index}", word & oracle.OFFSET, self.cluster)
        super()._walk(what, l1_offset, l1_size, active=active)

    def bitmaps(self) -> Iterator[Stored]:
        """Yield the bitmaps that the image has."""
        if self.version < 3 or not struct.unpack_from(">Q", self.data, 88)[0] & 1:
            return
        at = struct.unpack_from(">I", self.data, 100)[0]
        while True:
            kind, length = struct.unpack_from(">II", self.data, at)
            if not kind:
                return
            if kind == BITMAPS:
                break
            at += 8 + -(-length // 8) * 8
        count, _, size, place = struct.unpack_from(">IIQQ", self.data, at + 8)
        self.directory = place, size
        for _ in range(count):
            table, entries, flags, _, bits, length, extra = struct.unpack_from(">QIIBBHI", self.data, place)
            begin = place + 24 + extra
            yield Stored(self.data[begin : begin + length], flags, bits, table, entries)
            place = -(-(begin + length) // 8) * 8

    def dirty(self, bitmap: Stored) -> int:
        """Return the bits of *bitmap* as a number."""
        out = 0
        for index, word in enumerate(self.words(bitmap.table, bitmap.entries)):
            place = word & oracle.OFFSET
            data = self.data[place : place + self.cluster] if place else bytes([255 * (word & 1)]) * self.cluster
            out |= int.from_bytes(data, "little") << 8 * self.cluster * index
        return out

    def whole(self, snapshot: oracle.Snapshot) -> bytes:
        """Return what *snapshot* shows with the VM state behind its disk, unless that lies far away."""
        tables = len(self.words(snapshot.l1_offset, snapshot.l1_size))
        end = tables * (self.cluster // 8 // self.stride) * self.cluster
        size = max(snapshot.size, end) if end <= 4 << 20 else snapshot.size
        return self.content(replace(snapshot, size=size))


class DrawnLife(life.Life):
    """A life of a drawn image. With *fault* its medium fails once, and only the end is judged."""

    def __init__(
        self, image: Image, rng: random.Random, *, sector: int = 1, fault: Callable[[FaultNode], None] | None = None
    ) -> None:
        shape, folder = image.shape, image.path.parent
        data = image.path.read_bytes()
        compatible, autoclear = struct.unpack_from(">QQ", data, 80) if shape.version > 2 else (0, 0)
        (name,) = struct.unpack_from(">Q", data, 8)
        self.image = image
        self.shape = images.Shape(
            version=shape.version, cluster=shape.cluster, refcount_bits=1 << shape.order, size=image.size, backed=bool(name),
            lazy=bool(compatible & 1), extended=shape.extended, data=("raw" if autoclear & 2 else "plain") if shape.external else "",
        )  # fmt: skip
        self.rng = rng
        self.base = (folder / "b").read_bytes() if name else b""
        self.key = None
        media: list[MemoryNode] = [images.Medium(content=data)]
        if shape.external:
            media.append(images.Medium(content=(folder / "disk.data").read_bytes()))
        self.media = media
        self.failing = fault is not None
        below: list[BlockNode] = list(media)
        if fault is not None:
            chosen = rng.randrange(len(media))
            below[chosen] = failing = FaultNode(media[chosen], sector=512)
            fault(failing)
        self.recorder = RecorderNode(below[0], sector=sector)
        self.log = self.recorder.log
        self.data = [RecorderNode(node, sector=sector, log=self.log) for node in below[1:]]
        self.keepers = [Disk(node) for node in (self.recorder, *self.data)]
        self.size = image.size
        self.expected = ExpectedContent(self.log, self.size, image.content)
        self.snapshots = [life._SnapshotLife(s.name.decode(), s.content, (0, 0)) for s in image.snapshots]
        self.reflagging = []
        self.verdicts = life.Verdicts()
        self.steps = []
        self.refused = 0
        judged = Judged(data, self.base, *(node.snapshot_bytes() for node in media[1:]))
        #: Bitmaps that follow every write from the beginning on.
        self.following = {b.name: judged.dirty(b) for b in judged.bitmaps() if b.flags & (IN_USE | AUTO) == AUTO}
        self.states = {one.name: judged.whole(one) for one in judged.snapshots}
        self.followed = 0  #: looks at bitmaps that could be trusted
        self.opened = True
        with self._reflagging():
            self.disk = self._open()

    # -- living

    def live(self, count: int) -> None:
        """Take *count* steps, some of which the image refuses or the medium fails, and close it."""
        verbs = [self.write] * 8 + [self.batch, self.zero, self.zero, self.discard, self.discard, self.flush]
        verbs += [self.flush, self.reopen, self.grow, self.shrink, self.amend, self.rename, self.commit_into]
        verbs += [self.compact, self.repair, self.bitmap, self.bitmap]
        if not self.shape.data:
            verbs += [self.write_compressed] * 2
        if self.image.snapshots or self.shape.snapshots:
            verbs += [self.snapshot] * 2 + [self.apply, self.delete, self.delete]
        with suppress(CowhandError):  # of opening, where the medium does not recover
            for _ in range(count):
                self.attempt(self.rng.choice(verbs))
        with suppress(CowhandError):
            self.finish()

    def attempt(self, verb: Callable[[], None]) -> None:
        """Do *verb*; what fails may have happened or not, and an image that gave up is opened again."""
        try:
            verb()
        except CowhandError as error:
            self.refused += 1
            self.steps.append(f"{self.log.now()}: refused {error}")
        if self.opened and self.disk.root.poison is not None:
            self.opened = False
            with suppress(CowhandError):
                self.disk.close()
        if not self.opened:
            self._forget_unflushed()
            with self._reflagging():
                self.disk = self._open()
            self.opened = True
        self.size = self.disk.size
        self.expected.now = self.expected.now[: self.size].ljust(self.size, b"\0")  # after a resize that failed

    def _forget_unflushed(self) -> None:
        """Have no later flush vouch for what an image that gave up had not flushed."""
        horizon = self.expected._horizon(END_OF_LOG)
        for versions in self.expected._sectors.values():
            for step in (version.step for version in versions):
                if not step.firm and step.end is not None and step.end >= horizon:
                    step.end = None

    @contextmanager
    def closed(self) -> Any:
        """Close the image for what opens it itself."""
        self.opened = False
        with self.expected.flushing():
            self.disk.close()
        yield
        self.disk = self._open()
        self.opened = True

    def reopen(self) -> None:
        """Close the image and open it again."""
        self._tell("reopen")
        with self.closed():
            pass

    def snapshot(self) -> None:
        if self.rng.random() < 0.5 or self.shape.snapshots:
            super().snapshot()

    def write_compressed(self) -> None:
        """Store a cluster compressed by the way that tools do, where nothing has a place."""
        cluster = self.shape.cluster
        offset = self.rng.randrange(self.size // cluster) * cluster
        node = self.disk.root
        assert isinstance(node, Qcow2Node)
        if node.map(offset, cluster)[1] & ALLOCATED:
            return
        self._tell("compressed", offset, cluster)
        data = (self.rng.randbytes(cluster // 8) * 8)[:cluster]
        with self.expected.writing(offset, data):
            write_compressed(node, self.disk.edge, offset, memoryview(data))

    def _description(self, **more: Any) -> dict[str, Any]:
        out: dict[str, Any] = {"driver": "qcow2", "file": self.recorder, "backing": self._backing(), **more}
        if self.data:
            out["data-file"] = self.data[0]
        return out

    def compact(self) -> None:
        """Compact the file."""
        self._tell("compact")
        with self.closed(), self._reflagging():
            opening = Opening(REGISTRY, backing=False)
            opening.for_repair = True
            root = opening.open(self._description(**{"read-only": False, "backing": None}))
            assert isinstance(root, Qcow2Node)
            with Disk(root, writable=True):
                Compactor(root, None, None, self.rng.choice((8192, 4 << 30))).run()

    def repair(self) -> None:
        """Have what is lost given back."""
        kind = self.rng.choice(("leaks", "all"))
        self._tell(f"repair {kind}")
        with self.closed(), self._reflagging():
            result = check(self._description(backing=None), repair=kind)
            if result.failure is not None:
                raise result.failure
            assert result.clean or (self.failing and result.check_errors), result.messages

    def rename(self) -> None:
        """Change the backing file's name in the header, not what lies below."""
        self._tell("rename")
        node = self.disk.root
        assert isinstance(node, Qcow2Node)
        node.change_backing(self.rng.choice(("other", "b", "x" * 300, "/" + "long/" * 60)), "raw")

    def bitmap(self) -> None:
        """Make, remove or change a bitmap."""
        names = [entry.name for entry in bitmaps.list_bitmaps(self.disk)]
        verb = self.rng.choice(("add", "add", "remove", "clear", "disable", "merge"))
        self._tell(f"bitmap {verb}")
        chosen = self.rng.choice(names) if names else "none"
        if verb in ("remove", "clear", "disable"):
            self.following.pop(chosen.encode(), None)
        if verb == "add":
            bitmaps.add_bitmap(self.disk, f"n{len(names)}", granularity=self.rng.choice((512, 4096, 65536)))
        elif verb == "remove":
            bitmaps.remove_bitmap(self.disk, chosen)
        elif verb == "clear":
            bitmaps.clear_bitmap(self.disk, chosen)
        elif verb == "disable":
            bitmaps.enable_bitmap(self.disk, chosen, enabled=self.rng.random() < 0.5)
        elif names:
            bitmaps.merge_bitmap(self.disk, chosen, bitmaps.find_bitmap(self.disk, self.rng.choice(names)))

    def commit_into(self) -> None:
        """Write into an overlay, and commit that into the image."""
        overlay = images.Medium()
        keeper = Disk(overlay)
        Qcow2Node.create(overlay, self.size, {"cluster_size": self.rng.choice((512, 4096))})
        with images.open_over(overlay, writable=True) as disk, ExitStack() as stack:
            for _ in range(3):
                offset, length = self._place()
                length = min(length, self.size - offset)
                data = self.rng.randbytes(length)
                disk.write(offset, data)
            patch = disk.read(0, self.size)
            rows = [
                (row.start, row.end)
                for batch in [disk.root.map_batch(0, self.size)]
                for row in batch
                if row.flags & ALLOCATED
            ]
        self._tell("commit", 0, self.size)
        with self.closed():
            with ExitStack() as stack:
                # Whole clusters of the overlay come down, with what surrounds the data in them: zeroes.
                for begin, end in rows:
                    end = min(end, self.size)
                    stack.enter_context(self.expected.writing(begin, patch[begin:end]))
                commit({"driver": "qcow2", "file": overlay, "backing": self._description()}, drop=True)
            with self.expected.flushing():
                pass
        keeper.close()

    # -- judging

    def apply(self) -> None:
        """Go back to a snapshot, which bitmaps do not notice."""
        self.following.clear()
        super().apply()

    def _judge_bitmaps(self, image: Judged, content: bytes) -> None:
        """Raise where a bitmap that says that it can be trusted does not tell of what was written."""
        for bitmap in image.bitmaps():
            before = self.following.get(bitmap.name)
            if before is None or bitmap.flags & IN_USE:
                continue
            self.followed += 1
            now, unit = image.dirty(bitmap), 1 << bitmap.bits
            common = min(len(content), len(self.image.content))
            for number in range(-(-common // unit)):
                place = slice(number * unit, min(common, (number + 1) * unit))
                changed = content[place] != self.image.content[place]
                assert now >> number & 1 or not (changed or before >> number & 1), (
                    f"bitmap {bitmap.name!r} does not tell of granule {number}"
                )

    def _image(self, file: MemoryNode, others: Sequence[MemoryNode]) -> Judged:
        return Judged(file.snapshot_bytes(), self.base, *(node.snapshot_bytes() for node in others))

    def _judge_bytes(self, state: CrashState) -> bytes:
        moment = state.moment
        image = self._image(state.image, state.others)
        busy = any(begin <= moment <= end + 1 for begin, end in self.reflagging)
        if image.incompatible & DIRTY:
            assert self.shape.lazy or busy or "dirty" in self.image.odd or self.failing
            repaired = self._repaired(state)
            assert isinstance(repaired, Judged)
            image = repaired
        shape = self.image.shape
        wanted = 4 * bool(self.shape.data) + 16 * shape.extended + 8 * shape.zstd
        if image.version == 2:
            wanted = 0  # an image without compressed clusters loses that bit with the version
        assert image.incompatible == wanted, f"incompatible features {image.incompatible:#x}"
        findings = image.check()
        assert findings.corruptions == []
        if findings.lost_flags and shape.version > 2 and not busy:
            # One of several entries of the disk that shared a cluster is left.
            assert self.image.most_count > 1, findings.lost_flags
            self.verdicts.stale_flags += 1
        self.verdicts.leaking += bool(findings.leaks + findings.leaks_behind)
        content = self._judge_content(image, moment)
        self._judge_bitmaps(image, content)
        return content

    def _judge_state(self, name: str, image: Any, snapshot: Any) -> None:
        if name in self.states:
            compare(self.states[name], image.whole(snapshot), f"snapshot {name} and its VM state")

    def end(self) -> CrashState:
        """Return what is there now."""
        return CrashState(self.media[0].copy(), 1 << 61, "the end", tuple(node.copy() for node in self.media[1:]))

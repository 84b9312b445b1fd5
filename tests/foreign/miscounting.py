"""Lives of drawn images some of whose reference counts are wrong: whatever is done, or refused, the disk and its snapshots keep their content.

Source: QEMU ``docs/interop/qcow2``, "Host cluster management". Counts are found and spoilt without the driver's code.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import cowhand
from cowhand.block.disk import Disk
from cowhand.core.errors import CowhandError
from cowhand.image import bitmaps, snapshots
from cowhand.image.check import check
from cowhand.image.compact import compact
from tests.foreign.images import Image

_OFFSET = 0xFFFFFFFFFFFFFE00
#: Images that are refused, or of whose content there is more than one opinion.
STRANGE = {"unknown", "corrupt", "backing format", "size", "bitmap extra", "nameless", "dirty"}


class Counts:
    """The reference counts of an image in *data*, as its own tables place them."""

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.cluster = 1 << struct.unpack_from(">I", data, 20)[0]
        self.width = 1 << (struct.unpack_from(">I", data, 96)[0] if struct.unpack_from(">I", data, 4)[0] > 2 else 4)
        self.table, clusters = struct.unpack_from(">QI", data, 48)
        self.entries = clusters * self.cluster // 8
        self.per_block = self.cluster * 8 // self.width

    def block(self, index: int) -> int:
        """Return where block *index* lies, 0 where there is none."""
        if index >= self.entries:
            return 0
        word: int = struct.unpack_from(">Q", self.data, self.table + 8 * index)[0]
        return word & _OFFSET

    def _place(self, number: int) -> tuple[int, int]:
        """Return the bit of the file at which the count of cluster *number* begins, and how far it is shifted inside its byte."""
        at = self.block(number // self.per_block) * 8 + number % self.per_block * self.width
        return at // 8, at % 8

    def get(self, number: int) -> int:
        """Return the count of cluster *number*."""
        if not self.block(number // self.per_block):
            return 0
        at, shift = self._place(number)
        whole = int.from_bytes(self.data[at : at + max(1, self.width // 8)], "big")
        return whole >> shift & ((1 << self.width) - 1)

    def set(self, number: int, count: int) -> None:
        """Change the count of cluster *number*, which a block counts."""
        at, shift = self._place(number)
        size = max(1, self.width // 8)
        whole = int.from_bytes(self.data[at : at + size], "big") & ~(((1 << self.width) - 1) << shift)
        self.data[at : at + size] = (whole | count << shift).to_bytes(size, "big")

    def used(self) -> list[int]:
        """Return the clusters that are counted."""
        last = -(-len(self.data) // self.cluster)
        return [number for number in range(last) if self.get(number)]


def miscount(data: bytearray, rng: random.Random, *, gentle: bool) -> str:
    """Make some counts of the image in *data* wrong, never the header's; say which. *gentle*: of single clusters only."""
    counts = Counts(data)
    used = [number for number in counts.used() if number]
    if not used:
        return "nothing"
    most = (1 << counts.width) - 1
    if not gentle and rng.random() < 0.3:
        index = rng.choice(used) // counts.per_block
        if index and rng.random() < 0.5:
            struct.pack_into(">Q", data, counts.table + 8 * index, 0)
            return f"block {index} is gone"
        for number in used:
            if number // counts.per_block == index:
                counts.set(number, 0)
        return f"all counts of block {index} are zero"
    told = []
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        number = rng.choice(used)
        had = counts.get(number)
        count = rng.choice((0, 0, max(0, had - 1), min(most, had + 1), min(most, 2), rng.randint(0, min(most, 5))))
        counts.set(number, count)
        told.append(f"{number}: {had} -> {count}")
    return ", ".join(told)


class MiscountedLife:
    """Does things to the image at *path*, and knows what the disk and its snapshots must show. A context manager."""

    def __init__(self, image: Image, rng: random.Random) -> None:
        self.path = image.path
        self.rng = rng
        self.unit = image.shape.cluster
        self.content = bytearray(image.content)
        self.disk: Disk | None = None
        self.kept: dict[str, bytes] = {}
        self.steps: list[str] = []
        self.done = self.refused = 0
        self.over = False
        with self.opened(writable=False) as disk:
            for info, snapshot in zip(self._list(disk), image.snapshots, strict=True):
                self.kept[info.id] = snapshot.content

    @staticmethod
    def _list(disk: Disk) -> list[snapshots.SnapshotInfo]:
        return disk.root.list_snapshots() if hasattr(disk.root, "snapshots") else []

    def opened(self, *, writable: bool = True) -> Disk:
        """Return the open image; deleted space is given back to the file system."""
        return cowhand.open(self.path, format="qcow2", writable=writable, options={"discard": "unmap"})

    def live(self, count: int) -> Iterator[str]:
        """Take *count* steps; yield what was lost."""
        verbs: list[Callable[[], None]] = [self.write] * 8 + [self.zero, self.discard, self.discard, self.reopen]
        verbs += [self.snapshot, self.apply, self.delete, self.delete, self.grow, self.shrink, self.bitmap, self.mend]
        verbs += [self.pack, self.amend]
        for _ in range(count):
            if self.over:
                break
            verb = self.rng.choice(verbs)
            try:
                verb()
                self.done += 1
            except CowhandError as error:
                self.refused += 1
                self.steps.append(f"refused: {error}")
            if self.disk is not None and self.disk.root.poison is not None:  # type: ignore[attr-defined]
                self._leave()
            found = list(self.lost())
            if found:
                yield f"after {self.steps}: " + "; ".join(found)
                break
        self._leave()
        yield from (f"at the end, after {self.steps}: {what}" for what in self.lost())

    def _leave(self) -> None:
        disk, self.disk = self.disk, None
        if disk is not None:
            try:
                disk.close()
            except CowhandError as error:
                self.steps.append(f"closing: {error}")

    def _open(self) -> Disk:
        if self.disk is None:
            try:
                self.disk = self.opened()
            except CowhandError:
                self.over = True  # marked corrupt: it is only read from now on
                raise
        return self.disk

    def lost(self) -> Iterator[str]:
        """Yield what does not show what it has to."""
        disk = self.disk if self.disk is not None else self.opened(writable=False)
        try:
            size = disk.size
            if size != len(self.content):
                yield f"the disk has {size} bytes instead of {len(self.content)}"
            elif disk.read(0, size) != self.content:
                yield f"the disk differs at {_first(disk.read(0, size), bytes(self.content)):#x}"
            there = {info.id for info in self._list(disk)}
            if there != set(self.kept):
                yield f"there are snapshots {there} instead of {set(self.kept)}"
            for ident in there & set(self.kept):
                with snapshots.open_snapshot(disk, ident) as view:
                    found, wanted = view.read(0, view.size), self.kept[ident]
                common = min(len(found), len(wanted))
                if found[:common] != wanted[:common]:
                    yield f"snapshot {ident} differs at {_first(found, wanted):#x}"
        finally:
            if disk is not self.disk:
                disk.close()

    # -- verbs

    def _range(self) -> tuple[int, int]:
        size = len(self.content)
        length = min(size, self.rng.choice((512, self.unit, 3 * self.unit + 512, self.rng.randrange(1, 5 * self.unit))))
        return self.rng.randrange(size - length + 1), length

    def _change(self, name: str, offset: int, data: bytes, verb: Callable[[Disk], None]) -> None:
        self.steps.append(f"{name} {offset} {len(data)}")
        disk = self._open()
        before = bytes(self.content[offset : offset + len(data)])
        self.content[offset : offset + len(data)] = data
        try:
            verb(disk)
            disk.flush()
        except CowhandError:
            self._leave()
            with self.opened(writable=False) as again:
                now = again.read(offset, len(data))
            # What was refused may have been done in part.
            for at in range(len(data)):
                assert now[at] in (before[at], data[at]), f"{name}: neither old nor new at {offset + at:#x}"
            self.content[offset : offset + len(data)] = now
            raise

    def write(self) -> None:
        """Write anywhere."""
        if self.content:
            offset, length = self._range()
            data = self.rng.randbytes(length)
            self._change("write", offset, data, lambda disk: disk.write(offset, data))

    def zero(self) -> None:
        """Write zeroes anywhere."""
        if self.content:
            offset, length = self._range()
            self._change("zero", offset, bytes(length), lambda disk: disk.write_zeroes(offset, length, unmap=True))

    def discard(self) -> None:
        """Discard anything: what it reads as then is looked up."""
        if self.content:
            offset, length = self._range()
            self.steps.append(f"discard {offset} {length}")
            disk = self._open()
            disk.discard(offset, length)
            disk.flush()
            self.content[offset : offset + length] = disk.read(offset, length)

    def reopen(self) -> None:
        """Close the image and open it again."""
        self.steps.append("reopen")
        self._leave()
        self._open()

    def snapshot(self) -> None:
        """Make a snapshot."""
        self.steps.append("snapshot")
        info = snapshots.create_snapshot(self._open(), f"new {len(self.steps)}")
        self.kept[info.id] = bytes(self.content)

    def _some(self) -> str:
        return self.rng.choice(sorted(self.kept)) if self.kept else ""

    def apply(self) -> None:
        """Go back to a snapshot: its size and its content."""
        ident = self._some()
        self.steps.append(f"apply {ident}")
        disk = self._open()
        snapshots.apply_snapshot(disk, ident)
        wanted = self.kept[ident]
        self.content = bytearray(wanted[: disk.size].ljust(disk.size, b"\0"))

    def delete(self) -> None:
        """Delete a snapshot."""
        ident = self._some()
        self.steps.append(f"delete {ident}")
        snapshots.delete_snapshot(self._open(), ident)
        del self.kept[ident]

    def _resize(self, size: int) -> None:
        self.steps.append(f"resize {size}")
        disk = self._open()
        had = len(self.content)
        try:
            disk.resize(size, shrink=True)
        finally:
            if disk.size == size:
                self.content = self.content[:size].ljust(size, b"\0")
            elif size < had:
                # What was to be cut off may be gone already, and shows the backing file or zeroes.
                self._leave()
                with self.opened(writable=False) as again:
                    self.content[size:] = again.read(size, had - size)

    def grow(self) -> None:
        """Make the disk larger."""
        self._resize(-(-len(self.content) // 512) * 512 + 512 * self.rng.randrange(1, 9 * self.unit // 512 + 2))

    def shrink(self) -> None:
        """Make the disk smaller."""
        self._resize(self.rng.randrange(len(self.content) // 512 + 1) * 512)

    def bitmap(self) -> None:
        """Make or remove a bitmap."""
        disk = self._open()
        names = [one.name for one in bitmaps.list_bitmaps(disk)]
        if names and self.rng.random() < 0.5:
            self.steps.append(f"remove bitmap {names[0]}")
            bitmaps.remove_bitmap(disk, names[0])
        else:
            self.steps.append("add bitmap")
            bitmaps.add_bitmap(disk, f"made {len(self.steps)}", granularity=512, persistent=True)

    def mend(self) -> None:
        """Check, and repair."""
        kind = self.rng.choice(("leaks", "all"))
        self.steps.append(f"repair {kind}")
        self._leave()
        check(self.path, format="qcow2", repair=kind)

    def pack(self) -> None:
        """Compact the file."""
        self.steps.append("compact")
        self._leave()
        compact(self.path, format="qcow2")

    def amend(self) -> None:
        """Give the counts another width."""
        bits = self.rng.choice((8, 16, 64))
        self.steps.append(f"amend {bits}")
        self._open().root.amend({"refcount_bits": bits})  # type: ignore[attr-defined]


def _first(found: bytes, wanted: bytes) -> int:
    common = min(len(found), len(wanted))
    return next((at for at in range(common) if found[at] != wanted[at]), common)


def lost_by_miscounting(image: Image, seed: int) -> Iterator[str]:
    """Yield what a life of *image*, with wrong counts, loses."""
    if STRANGE & image.odd:
        return
    rng = random.Random(f"miscounted {seed}")
    data = bytearray(Path(image.path).read_bytes())
    told = miscount(data, rng, gentle=rng.random() < 0.7)
    image.path.write_bytes(data)
    with chdir(image.path.parent):
        life = MiscountedLife(image, rng)
        yield from (f"{told}: {what}" for what in life.live(rng.randint(3, 12)))

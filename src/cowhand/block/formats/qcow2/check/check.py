"""Checking qcow2: compare what the image says of its clusters with what refers to them (QEMU ``docs/interop/qcow2``, "Host cluster management").

Rooms: ``checkwalk`` and ``checkextensions`` count the references, this one compares and judges, ``repair`` mends; ``findings`` has the words. Counts
and words are those of qemu-img's check on the same image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.check.copied_flags import check_flags
from cowhand.block.formats.qcow2.check.refcount_blocks import count_blocks
from cowhand.block.formats.qcow2.check.references import Counters, Stopped, Walk
from cowhand.block.formats.qcow2.ondisk import findings as F, layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import words_of
from cowhand.block.formats.qcow2.refcount.counted import native
from cowhand.block.formats.qcow2.snapshot.table import REQUIRED_EXTRA, Reading, read_table
from cowhand.block.node.records import ERROR, LEAK, MAX_FINDINGS, NOTE, REPAIRED, UNREADABLE, CheckResult, Finding, Say
from cowhand.core.errors import CowhandError, ImageCorrupt, InvalidFormat

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.check.extensions import BitmapFindings
    from cowhand.block.formats.qcow2.check.repair import Uncounted
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.metadata.cluster_sets import Region
    from cowhand.block.formats.qcow2.snapshot.table import Snapshot

#: QEMU's own limit, and what keeps a check's memory within reason.
_MAX_CLUSTERS = (1 << 31) - 1
#: Differences of one block from which numpy judges them faster.
_MANY = 32


class Examination:
    """One check of one image, with the repairs that were asked for. Used once, by one thread, while nothing else uses the node."""

    def __init__(self, node: Qcow2Node, repair: str | None, say: Say, *, spare_bitmaps: bool = False) -> None:
        self.node = node
        self._tell = say
        self.room = MAX_FINDINGS  #: findings that may still be told
        self.fix_leaks = repair is not None
        self.fix_errors = repair == "all"
        self._spare_bitmaps = spare_bitmaps  #: what is wrong with them is none of this check's business
        self.fix_bitmaps = self.fix_errors and not spare_bitmaps
        self.bitmaps: BitmapFindings | None = None
        self.counters = Counters()
        self.rebuild = False  #: the refcount structure itself is damaged
        self.highest = 0  #: the last cluster in use
        self.per_block = node.refcounts.per_block
        self.order = node.header.refcount_order
        self.unreadable: set[int] = set()  #: refcount blocks that cannot be looked at
        self.regions: list[Region] | None = None  #: metadata that must not be written by mistake; once it is known
        self.wrote_counts = False
        self._told_unaligned = False
        self.marked = False  #: marked corrupt by this check: a new refcount structure may be made, but no count of the old one is touched
        self._kept: Uncounted | None = None
        self._mismatched: list[int] = []  #: refcount blocks that differ from the tally
        self._compared = 0  #: clusters that the last comparison went over
        self.walk = self.new_walk(fix=self.fix_errors)

    def say(self, finding: Finding) -> None:
        """Tell *finding*, or, once after very many, that there is more: a small image can have millions of wrong counts."""
        self.room -= 1
        if self.room >= 0:
            self._tell(finding)
        elif self.room == -1:
            self._tell(Finding(F.MORE, NOTE, limit=MAX_FINDINGS))

    def new_walk(self, *, fix: bool) -> Walk:
        """Begin counting anew."""
        from cowhand.block.formats.qcow2.check.repair import zero_entry

        repairing = (lambda host, index, active: zero_entry(self, host, index, active)) if fix else None
        self.walk = Walk(self.node, self.say, self.counters, repairing)
        self.walk.room = min(self.walk.room, max(0, self.room) + 1)
        self._kept = None
        return self.walk

    def end(self) -> None:
        """Let go of what was counted, which can be much: the examination and its walk refer to one another."""
        del self.walk
        self._kept = self.regions = None

    # -- the whole of it

    def run(self) -> CheckResult:
        """Check, and repair. What stopped the check on its way is in the result."""
        snapshots, bitmaps = Counters(), Counters()
        result = CheckResult()
        try:
            if self.fix_leaks:
                # Before anything that they vouch for is given back.
                self.node.clear_unknown_marks()
            self._read_snapshot_table(snapshots)
            self._look_at_bitmaps(bitmaps)
            self._examine(result)
            if snapshots.corruptions and self.fix_errors:
                from cowhand.block.formats.qcow2.check.repair import rewrite_snapshots

                rewrite_snapshots(self, snapshots)
            sound = not (self.counters.check_errors or self.counters.corruptions or self.marked)
            if bitmaps.corruptions and self.fix_bitmaps and sound:
                from cowhand.block.formats.qcow2.check.extensions import rewrite_bitmaps

                rewrite_bitmaps(self, bitmaps)
            if self.marked and self.fix_leaks:
                # What the damaged structure held was not put right: that takes another look, at the new one.
                raise Stopped(
                    ImageCorrupt(
                        "the image was marked corrupt on the way",
                        qemu="No medium found",
                        path=self.node.filename,
                        errno=123,
                    )
                )
            if self.fix_leaks and not any(
                (self.counters.check_errors, self.counters.corruptions, snapshots.corruptions, bitmaps.corruptions)
            ):
                from cowhand.block.formats.qcow2.check.repair import mark_sound

                mark_sound(self.node)
        except Stopped as stopped:
            result.failure = stopped.error
        except CowhandError as error:
            result.failure = error
        for name in Counters.__slots__:
            setattr(result, name, sum(getattr(part, name) for part in (self.counters, snapshots, bitmaps)))
        return result

    def _look_at_bitmaps(self, counters: Counters) -> None:
        if self.node.header.find(L.EXT_BITMAPS) is None:
            return
        from cowhand.block.formats.qcow2.check.extensions import tell_bitmaps

        tell_bitmaps(self, Counters() if self._spare_bitmaps else counters)

    def _read_snapshot_table(self, counters: Counters) -> None:
        node = self.node
        if not node.header.snapshot_count:
            return
        reading = Reading()
        try:
            node.snapshots = self._checked_table(reading)
        except InvalidFormat as error:
            counters.check_errors += 1
            prefix = "" if error.facts.get("pointer") else "failed to read the snapshot table: "
            reason = f"{prefix}{error.qemu_message}"
            self.say(
                Finding(F.SNAPSHOT_TABLE, UNREADABLE, offset=error.offset, owner="the snapshot table", reason=reason)
            )
            if error.facts.get("advice"):
                self.say(Finding(F.SNAPSHOT_ADVICE, NOTE, advice=error.facts["advice"]))
            # What was not read does not count.
            node.snapshots, node.snapshot_table_bytes = [], 0
            raise Stopped(error) from error
        node.snapshot_table_bytes = reading.table_bytes
        counters.corruptions += reading.overhanging + reading.extra_dropped
        if reading.overhanging:
            from cowhand.block.formats.qcow2.check.repair import cut_snapshots

            cut_snapshots(node, len(node.snapshots))
            counters.corruptions -= reading.overhanging
            counters.corruptions_fixed += reading.overhanging
        if node.header.version >= 3:
            for index, snapshot in enumerate(node.snapshots):
                if snapshot.extra_size < REQUIRED_EXTRA:
                    counters.corruptions += 1
                    status = REPAIRED if self.fix_errors else ERROR
                    self.say(Finding(F.SNAPSHOT_INCOMPLETE, status, owner="the snapshot table", index=index))

    def _checked_table(self, reading: Reading) -> list[Snapshot]:
        header, path = self.node.header, self.node.filename
        too_many = header.snapshot_count - L.MAX_SNAPSHOTS
        if too_many > 0 and self.fix_errors:
            self.say(
                Finding(F.SNAPSHOTS_TOO_MANY, REPAIRED, offset=L.OFFSET_SNAPSHOTS, owner="the header", count=too_many)
            )
            reading.overhanging = too_many
            header.snapshot_count = L.MAX_SNAPSHOTS
        elif too_many > 0:
            raise InvalidFormat(
                f"{header.snapshot_count} snapshots are more than {L.MAX_SNAPSHOTS}", qemu="snapshot table too large", path=path,
                offset=L.OFFSET_SNAPSHOTS, errno=27, pointer=True,
                hint=f"A repair of everything removes the {too_many} snapshots that are too many.",
                advice=f"You can force-remove all {too_many} overhanging snapshots with qemu-img check -r all",
            )  # fmt: skip
        span = header.snapshot_count * L.SNAPSHOT_HEADER.size
        if header.snapshots_offset % self.walk.size or header.snapshots_offset > (1 << 63) - 1 - span:
            raise InvalidFormat(
                f"the snapshot table cannot lie at {header.snapshots_offset:#x}", qemu="snapshot table offset invalid", path=path,
                offset=L.OFFSET_SNAPSHOTS, pointer=True,
            )  # fmt: skip
        return read_table(self.node, reading, self.say if self.fix_errors else None)

    def _examine(self, result: CheckResult) -> None:
        walk = self.walk
        if walk.clusters > _MAX_CLUSTERS:
            self.counters.check_errors += 1
            raise Stopped(
                InvalidFormat(
                    "the file has too many clusters for a check",
                    qemu="File too large",
                    path=self.node.filename,
                    errno=27,
                )
            )
        result.total_clusters = -(-self.node.header.size // walk.size)
        self.calculate(fix=self.fix_errors)
        self._tell_allocation(result)
        before = self.counters.copy()
        self.compare(leaks=False, errors=False)
        if self.rebuild and self.fix_errors:
            from cowhand.block.formats.qcow2.check.repair import rebuild_counts

            rebuild_counts(self)
            self._tell_allocation(result)
        elif self.fix_leaks:
            if self.rebuild:
                self.say(Finding(F.REBUILD_NEEDED, UNREADABLE))
                self.counters.check_errors += 1
                raise Stopped(
                    InvalidFormat(
                        "the refcount structure must be rebuilt",
                        qemu="Input/output error",
                        path=self.node.filename,
                        errno=5,
                    )
                )
            if self.counters.leaks or self.counters.corruptions:
                self.counters.assign(before)
                hidden = self.hidden()
                if hidden:
                    self.say(Finding(F.LEAKS_KEPT, NOTE, what=hidden))
                self.compare(leaks=not hidden, errors=self.fix_errors)
        self._sync()
        check_flags(self)
        result.image_end_offset = (self.highest + 1) * walk.size

    def hidden(self) -> str | None:
        """Return what cannot be followed, and may have clusters that are called leaked; None where all that there is was followed."""
        if self.walk.uncertain:
            return "snapshots"
        return "bitmaps" if self.bitmaps is not None and self.bitmaps.hidden and not self.fix_bitmaps else None

    def _tell_allocation(self, result: CheckResult) -> None:
        walk = self.walk
        result.allocated_clusters = walk.allocated
        result.fragmented_clusters = walk.fragmented
        result.compressed_clusters = walk.compressed

    # -- counting

    def calculate(self, *, fix: bool) -> None:
        """Count all references, those to the refcount blocks last."""
        walk = self.walk
        walk.run()
        if self.bitmaps is not None:
            self.bitmaps.count(walk, dropping=self.fix_bitmaps)
        count_blocks(self, fix=fix)

    # -- comparing

    def _block_offset(self, index: int) -> int | None:
        """Return where refcount block *index* lies, None when there is none. Raises InvalidFormat where none can lie."""
        table = self.node.refcounts.table
        if index * 8 + 8 > len(table):
            return None
        offset = L.U64.unpack_from(table, index * 8)[0] & L.REFCOUNT_TABLE_OFFSET_MASK
        if not offset:
            return None
        if offset & (self.walk.size - 1):
            text = f"Refblock offset {offset:#x} unaligned (reftable index: {L.c_hex(index)})"
            raise InvalidFormat(text, path=self.node.filename, errno=5, unaligned=True)
        if offset + self.walk.size >= 1 << 63:
            raise InvalidFormat(
                f"no file is so long that refcount block {index} at {offset:#x} lies inside",
                path=self.node.filename,
                errno=5,
            )
        return int(offset)

    def disk_block(self, index: int) -> bytes | None:
        """Return refcount block *index* as native counts, None when there is none. Raises CowhandError when it cannot be read."""
        offset = self._block_offset(index)
        if offset is None:
            return None
        data = bytearray(self.walk.size)
        if offset < self.walk.length:
            self.node.file.read_into(offset, data)
        return native(data, self.order)

    @property
    def compared_bytes(self) -> int:
        """From this host offset on nothing was compared, and nothing lies in the file."""
        return max(self.walk.length, self._compared << self.walk.bits)

    def disk_count(self, cluster: int) -> int | None:
        """Return the count that the disk has for *cluster*, None when it cannot be read."""
        index = cluster // self.per_block
        if index in self.unreadable:
            return None
        if cluster < self._compared:
            return self.walk.tally.get(cluster)
        # One count of a block that may be 2 MiB long: nobody knows how many are asked for, and of how many blocks.
        begin, shift = divmod((cluster % self.per_block) << self.order, 8)
        data = bytearray(self.walk.tally.width)
        try:
            offset = self._block_offset(index)
            if offset is not None and offset + begin < self.walk.length:
                self.node.file.read_into(offset + begin, data)
        except CowhandError:
            return None
        return int.from_bytes(data, "big") >> shift & ((1 << (1 << self.order)) - 1)

    def _blocks(self) -> Iterator[int]:
        """Yield, rising, the refcount blocks that exist or in whose range something was counted."""
        limit = -(-self.walk.clusters // self.per_block)
        present = {
            index for index, entry in enumerate(words_of(bytes(self.node.refcounts.table))) if entry and index < limit
        }
        present.update(index for index in self.walk.tally.used_blocks(self.per_block) if index < limit)
        yield from sorted(present)

    def compare(self, *, leaks: bool, errors: bool, fresh: bool = False) -> None:
        """Compare the image's counts with the tally; mend leaks and errors in the image's where that was asked for.

        *fresh*: the refcount structure was just made, so a count that is missing in it may simply be put in.
        """
        tally, per_block = self.walk.tally, self.per_block
        self.highest = 0
        self.unreadable.clear()
        self._mismatched.clear()
        self._compared = self.walk.clusters
        for index in self._blocks():
            first = index * per_block
            count = min(per_block, self.walk.clusters - first)
            try:
                block = self.disk_block(index)
            except CowhandError as error:
                self._cannot_read(index, first, count, error)
                continue
            ours = tally.piece(first, count)
            theirs = block[: count * tally.width] if block is not None else None
            if theirs != ours:
                zeroes = bytes(count * tally.width)
                self._differing(index, theirs or zeroes, ours or zeroes, leaks, errors, fresh and theirs is not None)
            used = max(_used(theirs, tally.width), _used(ours, tally.width))
            if used:
                self.highest = first + used - 1

    def _cannot_read(self, index: int, first: int, count: int, error: CowhandError) -> None:
        if error.facts.get("unaligned") and not self._told_unaligned:
            self._told_unaligned = True
            kind = F.MARKED_CORRUPT if self.node.writable else F.FOUND_CORRUPT
            self.say(Finding(kind, owner="the refcount table", reason=error.message))
            if self.node.writable:
                self.node.set_corrupt_mark()
                self.marked = True
        self.unreadable.add(index)
        self.counters.check_errors += count
        for cluster in range(first, first + min(count, max(0, self.room) + 1)):
            self.say(Finding(F.COUNT_UNREADABLE, UNREADABLE, cluster=cluster, owner=f"refcount block {index}"))

    def _differing(self, index: int, theirs: bytes, ours: bytes, leaks: bool, errors: bool, fresh: bool) -> None:
        """Judge the clusters of block *index* whose counts on disk (*theirs*) are not what they ought to be."""
        tally, counters = self.walk.tally, self.counters
        first = index * self.per_block
        on_disk, real = memoryview(theirs).cast(tally.code), memoryview(ours).cast(tally.code)
        mended = bytearray(theirs)
        target = memoryview(mended).cast(tally.code)
        self._mismatched.append(index)
        owner = f"refcount block {index}"
        many = self.room < 0
        found = differences(on_disk, real, many or tally.numpy)
        if many and len(found) >= _MANY:
            self._differing_untold(found, on_disk, real, target, first, (leaks, errors, fresh))
            found = []
        for at in found:
            had, wanted = on_disk[at], real[at]
            mend = False
            if had == 0 and not fresh:
                self.rebuild = True
            else:
                mend = leaks if had > wanted else errors
                if mend and not wanted and first + at in self._protected():
                    mend = False
            if self.room >= 0:
                status = REPAIRED if mend else ERROR if had < wanted else LEAK
                kind = F.COUNT_LOW if had < wanted else F.LEAKED
                self.say(Finding(kind, status, cluster=first + at, owner=owner, refcount=had, reference=wanted))
            if mend:
                target[at] = wanted
            if had < wanted:
                counters.corruptions_fixed += mend
                counters.corruptions += not mend
            else:
                counters.leaks_fixed += mend
                counters.leaks += not mend
        if mended != theirs:
            from cowhand.block.formats.qcow2.check.repair import write_counts

            write_counts(self, index, mended)

    def _differing_untold(
        self,
        found: list[int],
        on_disk: memoryview,
        real: memoryview,
        target: memoryview,
        first: int,
        how: tuple[bool, bool, bool],
    ) -> None:
        """Do the same for many clusters at once, when no line is left to tell of each: a small image can have millions of them."""
        import numpy as np

        leaks, errors, fresh = how
        had, wanted = np.asarray(on_disk)[found], np.asarray(real)[found]
        missing, short = had == 0, had < wanted
        mend = np.where(short, errors, leaks)
        if not fresh:
            self.rebuild = self.rebuild or bool(missing.any())
            mend &= ~missing
        freed = np.flatnonzero(mend & (wanted == 0))
        if len(freed):
            mend[freed] = ~self._protected().among(np.asarray(found)[freed] + first)
        np.asarray(target)[np.asarray(found)[mend]] = wanted[mend]
        counters = self.counters
        counters.corruptions_fixed += int((short & mend).sum())
        counters.corruptions += int((short & ~mend).sum())
        counters.leaks_fixed += int((~short & mend).sum())
        counters.leaks += int((~short & ~mend).sum())

    def _protected(self) -> Uncounted:
        """Return clusters that are not freed although nothing was counted of them: metadata that could not be followed lies there."""
        kept = self._kept
        if kept is None:
            from cowhand.block.formats.qcow2.check.repair import Uncounted

            kept = self._kept = Uncounted(self)
        return kept

    def _sync(self) -> None:
        """Make the tally what the disk says: what was found different was told, and the COPIED bits are judged by the disk's counts."""
        tally = self.walk.tally
        for index in self._mismatched:
            first = index * self.per_block
            count = min(self.per_block, self._compared - first)
            block = self.disk_block(index)
            tally.replace(first, (block or bytes(self.per_block * tally.width))[: count * tally.width])


def check(node: Qcow2Node, repair: str | None, say: Say, *, spare_bitmaps: bool = False) -> CheckResult:
    """Check *node*, without requests in flight, and repair what *repair* says; with *spare_bitmaps* bitmaps are neither judged nor changed."""
    if repair is None and not node.in_use_for_writing:
        return _checked(node, repair, say, spare_bitmaps)
    with node.operation:
        if node.in_use_for_writing:
            node.flush()
            node.release_quarantine()
        with node.exclusive():
            if node.in_use_for_writing:
                node.write_back.run(locked=True)
                if node.lazy:
                    node.write_back.flush_refcounts()  # those on disk are judged, and those in memory forgotten
            return _checked(node, repair, say, spare_bitmaps)


def _checked(node: Qcow2Node, repair: str | None, say: Say, spare_bitmaps: bool) -> CheckResult:
    examination = Examination(node, repair, say, spare_bitmaps=spare_bitmaps)
    try:
        return examination.run()
    finally:
        examination.end()
        if repair is not None:
            from cowhand.block.formats.qcow2.check.repair import forget

            forget(node)


def differences(left: memoryview, right: memoryview, numpy: object) -> list[int]:
    """Return the indices at which two views differ."""
    if numpy:
        import numpy as np

        found: list[int] = np.flatnonzero(np.asarray(left) != np.asarray(right)).tolist()
        return found
    out = []
    # By halves: most of a block is equal, and equal stretches are compared by the memory.
    stack = [(0, len(left))]
    while stack:
        begin, end = stack.pop()
        if left[begin:end].tobytes() == right[begin:end].tobytes():
            continue
        if end - begin <= 64:
            out += [at for at in range(begin, end) if left[at] != right[at]]
        else:
            middle = (begin + end) // 2
            stack += ((middle, end), (begin, middle))
    return out


def _used(counts: bytes | None, width: int) -> int:
    """Return the index behind the last count that is not zero."""
    return -(-len(counts.rstrip(b"\0")) // width) if counts is not None else 0

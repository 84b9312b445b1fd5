"""Whether what counts as free is free: all that an image's tables refer to, held against its reference counts, once, before any of it is reused.

Source: QEMU ``docs/interop/qcow2``, "Host cluster management". One count that is too low is enough for a cluster in use to be handed out, cut off or
given back to the file system. Such counts are raised to what refers to the cluster; where that cannot be done the cluster is passed over, and where
the tables cannot be followed nothing is taken before the end of the file. Tables are read as columns, each of them once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import words_of
from cowhand.block.formats.qcow2.refcount.counted import Tally, encoded, native
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, ImageCorrupt

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.references import References

#: Bytes of metadata up to which an image is looked at before anything at all is taken, since that costs next to nothing.
SMALL = 512 << 10


def _nonzero(counts: bytes, tally: Tally) -> Iterator[int]:
    view = memoryview(counts).cast(tally.code)
    return (at for at, count in enumerate(view) if count)


def _low(theirs: bytes, ours: bytes, tally: Tally) -> list[int]:
    """Return the indices at which a count of *theirs* is lower than the one of *ours*."""
    if theirs == ours:
        return []
    if tally.numpy is not None:
        numpy = tally.numpy
        found: list[int] = numpy.flatnonzero(
            numpy.frombuffer(theirs, tally.code) < numpy.frombuffer(ours, tally.code)
        ).tolist()
        return found
    have, want = memoryview(theirs).cast(tally.code), memoryview(ours).cast(tally.code)
    if all(one >= other for one, other in set(zip(have, want, strict=True))):
        return []
    return [at for at, count in enumerate(want) if have[at] < count]


def raise_counts(found: References, spared: Container[int] = frozenset()) -> tuple[int, list[int]]:
    """Raise, in memory, counts that are lower than what *found* has counted; not those of *spared* clusters that are counted as free.

    Returns (how many were raised, clusters for which that cannot be done, ascending).
    """
    refcounts, tally = found.node.refcounts, found.tally
    raised, left = 0, sorted(found.crowded)
    for index in list(tally.used_blocks(refcounts.per_block)):
        first = index * refcounts.per_block
        ours = tally.piece(first, refcounts.per_block)
        if ours is None:
            continue
        try:
            block = refcounts.block(index)
        except CowhandError as error:
            found.failure = found.failure or error
            continue
        if block is None:
            left += (first + at for at in _nonzero(ours, tally) if first + at not in spared)
            continue
        theirs = native(block.data, tally.order)
        low = _low(theirs, ours, tally)
        if low:
            merged = array(tally.code, theirs)
            low = [at for at in low if merged[at] or first + at not in spared]
        if low:
            wanted = memoryview(ours).cast(tally.code)
            for at in low:
                merged[at] = wanted[at]
            block.data[:] = encoded(merged.tobytes(), tally.order)
            refcounts.cache.touch(block, 0, len(block.data))
            raised += len(low)
        refcounts.cache.trim()
    return raised, sorted({*left, *found.behind})


class Verification:
    """What is known of how far an image's counts can be relied on. The allocation lock is held for all of it.

    ``end`` is the first cluster that may be taken unverified: what lies behind the end of the file as it was opened nobody refers to. ``floor``:
    no cluster before it may be taken, since not all references could be followed. ``kept`` are single clusters that may not be, ascending.
    """

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.opened = -(-node.file.node.size // node.cluster_size)
        self.end = self.opened
        self.floor = 0
        self.kept: list[int] = []
        self.wrong: ImageCorrupt | None = None  #: clusters in use stay uncounted

    def prepare(self) -> None:
        """Before the first change: have small images, and files that were cut, verified whatever is taken first."""
        node = self.node
        size = len(node.metadata.clusters) * node.cluster_size
        if self.end and (size <= SMALL or self.looks_cut()):
            self.end = L.MAX_HOST_OFFSET // node.cluster_size

    def looks_cut(self) -> bool:
        """Tell whether the image counts clusters, or names blocks of counts, that lie behind the end of the file."""
        refcounts = self.node.refcounts
        index, at = divmod(self.opened, refcounts.per_block)
        table = words_of(bytes(refcounts.table))
        if any(table[index + 1 :]):
            return True
        try:
            block = refcounts.block(index)
        except CowhandError:
            return True
        return block is not None and refcounts.counts.last_used(block.data, refcounts.per_block) >= at

    def run(self) -> References | None:
        """Hold all references against the counts, and raise those that are too low. Tells of what is wrong; raises nothing.

        Returns None where there are no counts: damage that every allocation refuses by itself.
        """
        node = self.node
        self.end = 0
        if not self._counts_header():
            return None
        found = node.references()
        # Metadata that is called free is not handed out either: QEMU marks the image corrupt when it comes to it.
        raised, self.kept = raise_counts(found, node.metadata.clusters if node.like_qemu else frozenset())
        if raised:
            node.changed = True
        inside = bisect_left(self.kept, found.clusters)
        if raised or (inside and not node.like_qemu):
            mended = f"{raised} of them are counted from now on" if raised else "they are left alone"
            text = f"the reference counts of {raised + inside} clusters in use are too low; {mended}"
            diagnostics.report(f"warning: '{node.filename}': {text}. Run check on the image.", as_tool=True)
        self.wrong = None
        if inside:
            at = self.kept[0] * node.cluster_size
            self.wrong = ImageCorrupt(
                f"{inside} clusters in use have no reference count that can be trusted, the first at {at:#x}", qemu="Input/output error",
                path=node.filename, offset=at, hint="Repair the image first: check --repair all.",
            )  # fmt: skip
        if found.failure is not None and not self.floor:
            self.floor = max(self.floor, self.opened)
            if not node.like_qemu:
                diagnostics.report(
                    f"warning: '{node.filename}': not all that refers to clusters could be followed ({found.failure.message}), so nothing "
                    "before the end of the file counts as free. Run check on the image.", as_tool=True,
                )  # fmt: skip
        return found

    def again(self) -> None:
        """Have everything verified anew before anything is taken: there are blocks now for what could not be counted."""
        if self.kept:
            self.end = L.MAX_HOST_OFFSET // self.node.cluster_size

    def _counts_header(self) -> bool:
        """Tell whether the counts know of the header. Otherwise they are none, and the first allocation refuses them by itself."""
        node = self.node
        try:
            if node.refcounts.get(0):
                return True
            error = ImageCorrupt("the reference counts call the header free", path=node.filename, offset=0)
        except CowhandError as failure:
            error = ImageCorrupt(failure.message, qemu=failure.qemu_message, path=node.filename, offset=failure.offset)
        error.hint = "Repair the image first: check --repair all."
        self.wrong = error
        return False

    def require(self) -> None:
        """Verify, if that was not done. Raises ImageCorrupt where counts are too low and could not be raised."""
        if self.end:
            self.run()
        if self.wrong is not None:
            raise self.wrong

    def behind_kept(self, first: int, count: int) -> int:
        """Return the cluster behind the last of *count* from *first* on that may not be taken; *first* where all may."""
        if first < self.floor:
            return self.floor
        at = bisect_left(self.kept, first + count)
        return self.kept[at - 1] + 1 if at and self.kept[at - 1] >= first else first

    def first_kept(self, first: int, count: int) -> int:
        """Return how many of *count* clusters from *first* on lie before the first that may not be taken."""
        if first < self.floor:
            return 0
        at = bisect_left(self.kept, first)
        return min(count, self.kept[at] - first) if at < len(self.kept) else count

    def last_kept(self, end: int) -> int:
        """Return the last cluster before *end* that must be taken for used although its count does not say so; -1 for none."""
        at = bisect_left(self.kept, end)
        return max(self.kept[at - 1] if at else -1, min(self.floor, end) - 1)

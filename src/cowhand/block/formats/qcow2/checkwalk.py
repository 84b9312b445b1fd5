"""Checking qcow2, first part: follow every reference from the header on, and count it (QEMU ``docs/interop/qcow2``).

A table is looked at once, by its host offset, however many entries name it; what was wrong with it counts for each of them. Lines are
QEMU's, word for word.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cowhand.block.formats.qcow2 import layout as L
from cowhand.block.formats.qcow2.runs import runs_of, words_of
from cowhand.block.formats.qcow2.scan import Scan, Scanner
from cowhand.block.formats.qcow2.tally import Tally
from cowhand.core.errors import CowhandError, IOFailed

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.snapshots import Snapshot

_BITMAP_LOW = (1 << 32) - 1
#: How far behind the file's end, and its length again, a repair could come to write.
_NEAR = 64 << 20
_MANY_BEHIND = 1 << 18
#: Lines about damage that one walk tells; everything is counted.
_MOST_LINES = 1 << 18


class Counters:
    """Counts of one part of a check."""

    __slots__ = ("check_errors", "corruptions", "corruptions_fixed", "leaks", "leaks_fixed")

    def __init__(self) -> None:
        self.corruptions = self.leaks = self.check_errors = self.corruptions_fixed = self.leaks_fixed = 0

    def copy(self) -> Counters:
        """Return the counts as they are now."""
        out = Counters()
        out.assign(self)
        return out

    def assign(self, other: Counters) -> None:
        """Take over *other*'s counts."""
        for name in self.__slots__:
            setattr(self, name, getattr(other, name))


class Stopped(Exception):
    """The check cannot go on; ``error`` says why. It was counted and told already."""

    def __init__(self, error: CowhandError) -> None:
        super().__init__()
        self.error = error


class _Seen(NamedTuple):
    """What a look at an L2 table gave. Each of ``lines`` is a corruption, once for every entry that names the table."""

    scan: Scan
    lines: tuple[str, ...] = ()


class Walk:
    """Counts references of one image. ``tally`` is what the reference counts ought to be when :meth:`run` has ended."""

    def __init__(
        self,
        node: Qcow2Node,
        say: Callable[[str], None],
        counters: Counters,
        zero_entry: Callable[[int, int, bool], bool] | None,
    ) -> None:
        self.node = node
        self.say = say
        self.counters = counters
        #: Repairs an L2 entry (table offset, index, active) that can only be made zero; None when nothing is to be repaired.
        self._zero_entry = zero_entry
        header = node.header
        self.bits = header.cluster_bits
        self.size = 1 << self.bits
        # As QEMU counts: a file ends on a sector.
        self.length = -(-node.file.node.size // 512) * 512
        self.clusters = -(-self.length // self.size)
        self.tally = Tally(header.refcount_order, self.clusters, self._overflow)
        self.extended = bool(header.incompatible & L.INCOMPAT_EXTENDED_L2)
        self.external = bool(header.incompatible & L.INCOMPAT_DATA_FILE)
        self.scanner = Scanner(self.bits, self.tally, self.length, extended=self.extended, external=self.external)
        self.seen: dict[int, _Seen] = {}
        self._uses: dict[int, int] = {}
        self._l1: dict[tuple[int, int], array[int]] = {}
        self.allocated = self.fragmented = self.compressed = 0
        self._room = _MOST_LINES
        self.behind: set[int] = set()  #: clusters behind the end of the file that something refers to
        self.behind_many = False  #: too many of them to be remembered
        self.uncertain = False  #: a snapshot could not be followed: what it holds counts as unused

    def read(self, offset: int, length: int, what: str | None) -> bytes:
        """Return bytes of the file; behind its end lie zeroes. An I/O error ends the check; *what* tells of it, None keeps it quiet."""
        data = bytearray(length)
        if offset + length >= 1 << 63:
            raise self.unread(what, offset, "no file is that long")
        if offset < self.length and length:
            try:
                self.node.file.read_into(offset, data)
            except CowhandError as error:
                raise self.unread(what, offset, error.message) from error
        return bytes(data)

    def unread(self, what: str | None, offset: int, why: str) -> Stopped:
        """Return what ends the check because the file cannot be read at *offset*; tell *what* that means."""
        if what is not None:
            self.counters.check_errors += 1
            self.say(what)
        return Stopped(IOFailed(why, qemu="Input/output error", path=self.node.filename, offset=offset))

    # -- counting

    def _overflow(self, cluster: int, times: int) -> None:
        self._wrong(
            times,
            f"ERROR: overflow cluster offset={cluster << self.bits:#x}\nUse qemu-img amend to increase the refcount entry width or "
            "qemu-img convert to create a clean copy if the image cannot be opened for writing",
        )

    def _wrong(self, times: int, *lines: str) -> None:
        """Count each of *lines* as *times* corruptions, and tell of them: of a number that somebody could read."""
        self.counters.corruptions += times * len(lines)
        for _ in range(min(times, self._room) if lines else 0):
            self._room -= len(lines)
            for line in lines:
                for part in line.split("\n"):
                    self.say(part)

    def _beyond(self, offset: int, length: int) -> str | None:
        if offset + length - self.length >= self.size:
            self._note_behind(offset, length)
            return (
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
                f"offset {offset:#x} size {length:#x}"
            )
        return None

    def _note_behind(self, offset: int, length: int) -> None:
        """Remember what is named behind the end: nobody may put anything else there. Far behind nobody would."""
        if offset > 2 * self.length + _NEAR or self.behind_many:
            return
        self.behind.update(
            range(offset >> self.bits, min(offset + length, 2 * self.length + _NEAR) + self.size - 1 >> self.bits)
        )
        self.behind_many = len(self.behind) > _MANY_BEHIND

    def _count(self, offset: int, length: int, times: int = 1) -> None:
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        # A region may reach a little behind the end.
        self.clusters = max(self.clusters, last + 1)
        self.tally.add(first, last - first + 1, times)

    def region(self, offset: int, length: int, times: int = 1) -> None:
        """Count *times* references to everything that ``[offset, offset + length)`` touches."""
        if length <= 0:
            return
        bad = self._beyond(offset, length)
        if bad is None:
            self._count(offset, length, times)
            return
        self._wrong(times, bad)

    # -- the parts of an image

    def run(self) -> None:
        """Count everything but the bitmaps and the refcount blocks."""
        node = self.node
        header = node.header
        self._count_uses()
        self.region(0, self.size)
        self.walk_l1(header.l1_offset, header.l1_size, active=True)
        self._walk_snapshots()
        self.region(header.snapshots_offset, node.snapshot_table_bytes)
        self.region(header.refcount_table_offset, header.refcount_table_clusters * self.size)
        from cowhand.block.formats.qcow2.checkextensions import count_encryption

        count_encryption(self)

    def _snapshot_trouble(self, snapshot: Snapshot) -> str | None:
        if not snapshot.l1_offset & (self.size - 1) and snapshot.l1_size <= L.MAX_L1_BYTES // L.ENTRY_SIZE:
            return None
        head = f"ERROR snapshot {snapshot.id} ({snapshot.name}) "
        if snapshot.l1_offset & (self.size - 1):
            return (
                head
                + f"l1_offset={snapshot.l1_offset:#x}: L1 table is not cluster aligned; snapshot table entry corrupted"
            )
        return head + f"l1_size={snapshot.l1_size:#x}: L1 table is too large; snapshot table entry corrupted"

    def _count_uses(self) -> None:
        """Find out how many L1 entries name each L2 table."""
        header = self.node.header
        # Many snapshots of a hostile image can have one L1 table.
        tables = Counter({(header.l1_offset, header.l1_size): 1})
        tables.update(
            (snapshot.l1_offset, snapshot.l1_size)
            for snapshot in self.node.snapshots
            if snapshot.l1_size and self._snapshot_trouble(snapshot) is None
        )
        uses = self._uses
        for (offset, entries), tables_alike in tables.items():
            try:
                words = self._read_l1(offset, entries, told=False)
            except Stopped:
                return  # the walk comes to the same place, and tells what it finds before
            for _, entry, times in runs_of(words):
                host = entry & L.L1_OFFSET_MASK
                uses[host] = uses.get(host, 0) + times * tables_alike

    def _read_l1(self, offset: int, entries: int, *, told: bool = True) -> array[int]:
        """Read an L1 table; the last few are kept, since many snapshots of a hostile image can name one."""
        key = (offset, entries)
        found = self._l1.get(key)
        if found is None:
            what = "ERROR: I/O error in check_refcounts_l1" if told else None
            # What lies behind the end is zero: it need not be looked at.
            inside = min(entries, max(0, -(-(self.length - offset) // L.ENTRY_SIZE)))
            if inside < entries and offset + entries * L.ENTRY_SIZE >= 1 << 63:
                raise self.unread(what, offset, "no file is that long")
            found = words_of(self.read(offset, inside * L.ENTRY_SIZE, what))
            if len(self._l1) >= 4:
                self._l1.pop(next(iter(self._l1)))
            self._l1[key] = found
        return found

    def _walk_snapshots(self) -> None:
        snapshots = self.node.snapshots
        if self.external and snapshots:
            self.say(f"ERROR {len(snapshots)} snapshots in image with data file")
            self.counters.corruptions += 1
        # Many snapshots of a hostile image can have one L1 table.
        alike = Counter((snapshot.l1_offset, snapshot.l1_size) for snapshot in snapshots)
        for snapshot in snapshots:
            trouble = self._snapshot_trouble(snapshot)
            if trouble is not None:
                self.uncertain = True
                self._wrong(1, trouble)
                continue
            tables = alike.pop((snapshot.l1_offset, snapshot.l1_size), 0)
            if tables:
                self.walk_l1(snapshot.l1_offset, snapshot.l1_size, active=False, tables=tables)

    def walk_l1(self, offset: int, entries: int, *, active: bool, tables: int = 1) -> None:
        """Follow one L1 table, which *tables* of the image's are."""
        if not entries:
            return
        self.region(offset, entries * L.ENTRY_SIZE, tables)
        within = self.size - 1
        for _, entry, times in runs_of(self._read_l1(offset, entries)):
            times *= tables
            if entry & L.L1_RESERVED_MASK:
                self._wrong(times, f"ERROR found L1 entry with reserved bits set: {entry:x}")
            host = entry & L.L1_OFFSET_MASK
            self.region(host, self.size, times)
            if host & within:
                self._wrong(times, f"ERROR l2_offset={host:x}: Table is not cluster aligned; L1 entry corrupted")
            seen = self.seen.get(host)
            if seen is None:
                seen = self.seen[host] = self._look(host, active)
            if active:
                self.allocated += seen.scan.allocated * times
                self.fragmented += seen.scan.fragmented * times
                self.compressed += seen.scan.compressed * times
            self._wrong(times, *seen.lines)

    # -- L2 tables

    def read_table(self, host: int) -> bytes:
        """Return the L2 table at *host* as it is on disk."""
        return self.read(host, self.size, "ERROR: I/O error in check_refcounts_l2")

    def _look(self, host: int, active: bool) -> _Seen:
        times = self._uses.get(host, 1)
        data = self.read_table(host)
        scan = self.scanner.scan(data, times)
        return _Seen(scan) if scan is not None else self._look_closely(host, data, times, active)

    def _look_closely(self, host: int, data: bytes, times: int, active: bool) -> _Seen:
        """Go through a table in which something is wrong, entry by entry."""
        lines: list[str] = []
        allocated = fragmented = compressed = following = 0
        words = words_of(data)
        bitmaps = words[1::2] if self.extended else None
        for index, entry in enumerate(words[::2] if self.extended else words):
            bitmap = bitmaps[index] if bitmaps is not None else 0
            if entry & L.ENTRY_COMPRESSED:
                compressed += self._compressed(index, entry, bitmap, times, lines)
                continue
            before = len(lines)
            if entry & L.L2_RESERVED_MASK:
                lines.append(f"ERROR found l2 entry with reserved bits set: {entry:x}")
            offset = entry & L.L2_OFFSET_MASK
            if not offset and not (self.external and entry & L.COPIED):
                if bitmap & _BITMAP_LOW:
                    lines.append("ERROR: Unallocated cluster has non-zero subcluster allocation map")
                continue
            if (bitmap >> 32) & bitmap:
                lines.append(f"ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap")
            if offset & (self.size - 1):
                has_data = bool(bitmap & _BITMAP_LOW) if self.extended else not entry & L.ENTRY_ZERO
                try:
                    if self._unaligned(host, index, offset, has_data, active, lines):
                        # Whoever names the table next meets the entry as it is now.
                        self._wrong(1, *lines[before:])
                        del lines[before:]
                        continue
                except Stopped:
                    self.counters.corruptions += len(lines)
                    for line in lines:
                        self.say(line)
                    raise
            allocated += 1
            fragmented += bool(following) and offset != following
            following = offset + self.size
            if self.external:
                continue
            beyond = self._beyond(offset, self.size)
            if beyond is not None:
                lines.append(beyond)
            else:
                self._count(offset, self.size, times)
        return _Seen(Scan(allocated + compressed, fragmented + compressed, compressed), tuple(lines))

    def _compressed(self, index: int, entry: int, bitmap: int, times: int, lines: list[str]) -> bool:
        """Count a compressed cluster, and tell what is wrong with it; return whether it counts as allocated."""
        location, nbytes = L.compressed_location(entry, self.bits)
        if entry & L.COPIED:
            lines.append(f"ERROR: coffset={location:#x}: copied flag must never be set for compressed clusters")
            entry ^= L.COPIED
        if self.external:
            lines.append(f"ERROR compressed cluster {index} with data file, entry={entry:#x}")
            return False
        if bitmap:
            lines.append(
                f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
            )
            return False
        beyond = self._beyond(location, nbytes)
        if beyond is not None:
            lines.append(beyond)
        else:
            self._count(location, nbytes, times)
        return True

    def _unaligned(self, host: int, index: int, offset: int, has_data: bool, active: bool, lines: list[str]) -> bool:
        """Tell of an entry whose cluster is not aligned; True when it was repaired, so that it refers to nothing any more."""
        if has_data:
            lines.append(f"ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted.")
            return False
        text = f"offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
        if self._zero_entry is None:
            lines.append("ERROR " + text)
            return False
        # Said and counted at once: once repaired, nobody meets it again.
        self.say("Repairing " + text)
        if self._zero_entry(host, index, active):
            self.counters.corruptions_fixed += 1
            return True
        self.counters.corruptions += 1
        return False

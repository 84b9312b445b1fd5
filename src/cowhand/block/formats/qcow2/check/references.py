"""Checking qcow2, first part: follow every reference from the header on, and count it (QEMU ``docs/interop/qcow2``).

A table is looked at once, by its host offset, however many entries name it; what was wrong with it counts for each of them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.formats.qcow2.ondisk import findings as F, layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import runs_of, words_of
from cowhand.block.formats.qcow2.refcount.counted import Tally
from cowhand.block.formats.qcow2.refcount.l2_scan import EMPTY, Scan, Scanner
from cowhand.block.node.records import ERROR, MAX_FINDINGS, REPAIRED, UNREADABLE, Finding, Kind, Say
from cowhand.core.errors import CowhandError, IOFailed

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.snapshot.table import Snapshot

_BITMAP_LOW = (1 << 32) - 1
#: How far behind the file's end, and its length again, a repair could come to write.
_NEAR = 64 << 20
_MANY_BEHIND = 1 << 18
#: Findings about damage that one walk tells; everything is counted.
_MOST_TOLD = MAX_FINDINGS + 1
#: Entries of an L1 table that are looked at together.
LARGE_L1 = 1 << 17


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
    """What a look at an L2 table gave. Each of ``found``, and each of the ``untold``, is a corruption, once for every entry that names the table."""

    scan: Scan
    found: tuple[Finding, ...] = ()
    untold: int = 0


class _Place:
    """Where an L2 entry stands: its table's host offset, and its number there, which moves on."""

    __slots__ = ("index", "owner", "stride", "table")

    def __init__(self, table: int, stride: int) -> None:
        self.table = table
        self.stride = stride
        self.index = 0
        self.owner = f"L2 table at {table:#x}"

    @property
    def at(self) -> int:
        """The entry's byte of the file."""
        return self.table + self.index * self.stride * L.ENTRY_SIZE

    def wrong(self, kind: Kind, cluster: int | None = None, *, status: str = ERROR, **facts: Any) -> Finding:
        return Finding(kind, status, cluster=cluster, offset=self.at, owner=self.owner, **facts)


#: What lies behind the end of the file.
_NOTHING = _Seen(EMPTY)


class Walk:
    """Counts references of one image. ``tally`` is what the reference counts ought to be when :meth:`run` has ended."""

    def __init__(
        self,
        node: Qcow2Node,
        say: Say,
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
        self.room = _MOST_TOLD  #: findings that it still tells
        self.behind: set[int] = set()  #: clusters behind the end of the file that something refers to
        self.behind_many = False  #: too many of them to be remembered
        self.uncertain = False  #: a snapshot could not be followed: what it holds counts as unused

    def read(self, offset: int, length: int, kind: Kind | None) -> bytes:
        """Return bytes of the file; behind its end lie zeroes. An I/O error ends the check; a finding of *kind* tells of it, None keeps it quiet."""
        data = bytearray(length)
        if offset + length >= 1 << 63:
            raise self.unread(kind, offset, "no file is that long")
        if offset < self.length and length:
            try:
                self.node.file.read_into(offset, data)
            except CowhandError as error:
                raise self.unread(kind, offset, error.message) from error
        return bytes(data)

    def unread(self, kind: Kind | None, offset: int, why: str) -> Stopped:
        """Return what ends the check because the file cannot be read at *offset*; a finding of *kind* tells so, None keeps it quiet."""
        if kind is not None:
            self.counters.check_errors += 1
            self.say(Finding(kind, UNREADABLE, offset=offset))
        return Stopped(IOFailed(why, qemu="Input/output error", path=self.node.filename, offset=offset))

    # -- counting

    def _overflow(self, cluster: int, times: int) -> None:
        self._wrong(times, Finding(F.COUNT_OVERFLOW, cluster=cluster, host=cluster << self.bits))

    def _wrong(self, times: int, *found: Finding) -> None:
        """Count each of *found* as *times* corruptions, and tell of them: of a number that somebody could read."""
        self.counters.corruptions += times * len(found)
        for _ in range(min(times, self.room) if found else 0):
            self.room -= len(found)
            for finding in found:
                self.say(finding)

    def _beyond(self, offset: int, length: int, of: _Place | str) -> Finding | None:
        """Return what is wrong when ``[offset, offset + length)``, which an L2 entry names or which holds *of*, does not lie in the file."""
        if offset + length - self.length < self.size:
            return None
        self._note_behind(offset, length)
        cluster = offset >> self.bits
        if isinstance(of, _Place):
            return of.wrong(F.BEYOND_END, cluster, host=offset, length=length)
        return Finding(F.BEYOND_END, cluster=cluster, owner=of, host=offset, length=length)

    def _note_behind(self, offset: int, length: int) -> None:
        """Remember what is named behind the end: nobody may put anything else there. Far behind nobody would."""
        if offset > 2 * self.length + _NEAR or self.behind_many:
            return
        self.behind.update(
            range(offset >> self.bits, min(offset + length, 2 * self.length + _NEAR) + self.size - 1 >> self.bits)
        )
        self.behind_many = len(self.behind) > _MANY_BEHIND

    def note_all_behind(self, offsets: Any, length: int) -> None:
        """Do the same for many *offsets*, a numpy array, of *length* bytes each."""
        near = [] if self.behind_many else offsets[offsets <= 2 * self.length + _NEAR][: _MANY_BEHIND + 1].tolist()
        for offset in near:
            self._note_behind(offset, length)

    def count(self, offset: int, length: int, times: int = 1) -> None:
        """Count *times* references to what ``[offset, offset + length)`` touches."""
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        # A region may reach a little behind the end.
        self.clusters = max(self.clusters, last + 1)
        self.tally.add(first, last - first + 1, times)

    def region(self, offset: int, length: int, owner: str, times: int = 1) -> None:
        """Count *times* references to everything that ``[offset, offset + length)``, which holds *owner*, touches."""
        if length <= 0:
            return
        bad = self._beyond(offset, length, owner)
        if bad is None:
            self.count(offset, length, times)
            return
        self._wrong(times, bad)

    # -- the parts of an image

    def run(self) -> None:
        """Count everything but the bitmaps and the refcount blocks."""
        node = self.node
        header = node.header
        self._count_uses()
        self.region(0, self.size, "the header")
        self.walk_l1(header.l1_offset, header.l1_size, "the active L1 table", active=True)
        self._walk_snapshots()
        self._l1.clear()  # they can be 32 MiB each
        self.region(header.snapshots_offset, node.snapshot_table_bytes, "the snapshot table")
        self.region(header.refcount_table_offset, header.refcount_table_clusters * self.size, "the refcount table")
        from cowhand.block.formats.qcow2.check.extensions import count_encryption

        count_encryption(self)

    def _snapshot_trouble(self, snapshot: Snapshot) -> Finding | None:
        if not snapshot.l1_offset & (self.size - 1) and snapshot.l1_size <= L.MAX_L1_BYTES // L.ENTRY_SIZE:
            return None
        about: dict[str, Any] = {"owner": "the snapshot table", "id": snapshot.id, "name": snapshot.name}
        if snapshot.l1_offset & (self.size - 1):
            return Finding(F.SNAPSHOT_L1_UNALIGNED, host=snapshot.l1_offset, **about)
        return Finding(F.SNAPSHOT_L1_TOO_LARGE, size=snapshot.l1_size, **about)

    def _count_uses(self) -> None:
        """Find out how many L1 entries name each L2 table."""
        header = self.node.header
        # Many snapshots of a hostile image can have one L1 table.
        tables = Counter({(header.l1_offset, header.l1_size): 1})
        for snapshot, count in self._snapshots():
            if snapshot.l1_size and self._snapshot_trouble(snapshot) is None:
                tables[snapshot.l1_offset, snapshot.l1_size] += count
        uses = self._uses
        for (offset, entries), tables_alike in tables.items():
            try:
                words = self._read_l1(offset, entries, told=False)
            except Stopped:
                return  # the walk comes to the same place, and tells what it finds before
            if len(words) >= LARGE_L1:
                words = self._inside(words)
            for _, entry, times in runs_of(words):
                host = entry & L.L1_OFFSET_MASK
                if host < self.length:  # what lies behind the end refers to nothing
                    uses[host] = uses.get(host, 0) + times * tables_alike

    def _read_l1(self, offset: int, entries: int, *, told: bool = True) -> array[int]:
        """Read an L1 table; the last few are kept, since many snapshots of a hostile image can name one."""
        key = (offset, entries)
        found = self._l1.get(key)
        if found is None:
            kind = F.L1_UNREADABLE if told else None
            # What lies behind the end is zero: it need not be looked at.
            inside = min(entries, max(0, -(-(self.length - offset) // L.ENTRY_SIZE)))
            if inside < entries and offset + entries * L.ENTRY_SIZE >= 1 << 63:
                raise self.unread(kind, offset, "no file is that long")
            found = words_of(self.read(offset, inside * L.ENTRY_SIZE, kind))
            if len(self._l1) >= 4:
                self._l1.pop(next(iter(self._l1)))
            self._l1[key] = found
        return found

    def _walk_snapshots(self) -> None:
        snapshots = self.node.snapshots
        if self.external and snapshots:
            self.say(Finding(F.SNAPSHOTS_WITH_DATA_FILE, owner="the snapshot table", count=len(snapshots)))
            self.counters.corruptions += 1
        alike = Counter((snapshot.l1_offset, snapshot.l1_size) for snapshot in snapshots)
        for snapshot, count in self._snapshots():
            trouble = self._snapshot_trouble(snapshot)
            if trouble is not None:
                self.uncertain = True
                self._wrong(count, trouble)
                continue
            tables = alike.pop((snapshot.l1_offset, snapshot.l1_size), 0)
            if tables:
                owner = f"the L1 table of snapshot '{snapshot.name}'"
                self.walk_l1(snapshot.l1_offset, snapshot.l1_size, owner, active=False, tables=tables)

    def _snapshots(self) -> Iterator[tuple[Snapshot, int]]:
        """Yield the snapshots, and how often each is in the table on end: the same entry may be there thousands of times."""
        for _, group in groupby(self.node.snapshots, id):
            alike = list(group)
            yield alike[0], len(alike)

    def walk_l1(self, offset: int, entries: int, owner: str, *, active: bool, tables: int = 1) -> None:
        """Follow one L1 table, which is *owner*, and which *tables* of the image's are."""
        if not entries:
            return
        self.region(offset, entries * L.ENTRY_SIZE, owner, tables)
        within = self.size - 1
        words = self._read_l1(offset, entries)
        if len(words) >= LARGE_L1:
            words = self._without_lost(words, tables)
        for first, entry, times in runs_of(words):
            times *= tables
            at = offset + first * L.ENTRY_SIZE
            host = entry & L.L1_OFFSET_MASK
            if entry & L.L1_RESERVED_MASK:
                self._wrong(times, Finding(F.L1_RESERVED, offset=at, owner=owner, entry=entry))
            self.region(host, self.size, owner, times)
            if host & within:
                self._wrong(
                    times,
                    Finding(F.L2_TABLE_UNALIGNED, cluster=host >> self.bits, offset=at, owner=owner, host=host),
                )
            seen = self.seen.get(host) if host < self.length else _NOTHING
            if seen is None:
                seen = self.seen[host] = self._look(host, active)
            if active:
                self.allocated += seen.scan.allocated * times
                self.fragmented += seen.scan.fragmented * times
                self.compressed += seen.scan.compressed * times
            self._wrong(times, *seen.found)
            self.counters.corruptions += times * seen.untold

    def _inside(self, words: array[int]) -> array[int]:
        """Return a large L1 table without the entries that name what lies behind the end."""
        import numpy

        rest = array("Q", words)
        column = numpy.frombuffer(rest, "u8")
        for first in range(0, len(column), LARGE_L1):
            piece = column[first : first + LARGE_L1]
            piece[piece & numpy.uint64(L.L1_OFFSET_MASK) >= self.length] = 0
        return rest

    def _without_lost(self, words: array[int], tables: int) -> array[int]:
        """Count those entries of a large L1 table that name what lies behind the end, but for so many as somebody hears of; return the others.

        There can be four million, each of another place.
        """
        import numpy

        u8 = numpy.uint64
        rest = array("Q", words)
        column = numpy.frombuffer(rest, "u8")
        room = max(0, self.room)
        for first in range(0, len(column), LARGE_L1):
            piece = column[first : first + LARGE_L1]
            host = piece & u8(L.L1_OFFSET_MASK)
            lost = numpy.flatnonzero((host >= self.length) & (host != 0))
            room, lost = max(0, room - len(lost)), lost[room:]
            places = host[lost]
            reserved = numpy.count_nonzero(piece[lost] & u8(L.L1_RESERVED_MASK))
            unaligned = numpy.count_nonzero(places & u8(self.size - 1))
            self.counters.corruptions += (len(lost) + int(reserved) + int(unaligned)) * tables
            self.note_all_behind(places, self.size)
            piece[lost] = 0
        return rest

    # -- L2 tables

    def read_table(self, host: int) -> bytes:
        """Return the L2 table at *host* as it is on disk."""
        return self.read(host, self.size, F.L2_UNREADABLE)

    def _look(self, host: int, active: bool) -> _Seen:
        times = self._uses.get(host, 1)
        data = self.read_table(host)
        scan = self.scanner.scan(data, times)
        if scan is not None:
            return _Seen(scan)
        # Once no finding is told any more, none is made, unless a repair has to look at the entries.
        if self.room <= 0 and self._zero_entry is None:
            from cowhand.block.formats.qcow2.check import odd_tables

            scan, untold = odd_tables.count(self, data, times)
            return _Seen(scan, (), untold)
        return self._look_closely(host, data, times, active)

    def _look_closely(self, host: int, data: bytes, times: int, active: bool) -> _Seen:
        """Go through a table in which something is wrong, entry by entry."""
        found: list[Finding] = []
        allocated = fragmented = compressed = following = 0
        words = words_of(data)
        stride = 2 if self.extended else 1
        bitmaps = words[1::2] if self.extended else None
        place = _Place(host, stride)
        for index, entry in enumerate(words[::2] if self.extended else words):
            bitmap = bitmaps[index] if bitmaps is not None else 0
            place.index = index
            if entry & L.ENTRY_COMPRESSED:
                compressed += self._compressed(place, entry, bitmap, times, found)
                continue
            before = len(found)
            if entry & L.L2_RESERVED_MASK:
                found.append(place.wrong(F.L2_RESERVED, entry=entry))
            offset = entry & L.L2_OFFSET_MASK
            plain_zero = entry & L.ENTRY_ZERO and not self.extended
            if not offset and (plain_zero or not (self.external and entry & L.COPIED)):
                if bitmap & _BITMAP_LOW:
                    found.append(place.wrong(F.SUBCLUSTERS_WITHOUT_CLUSTER))
                continue
            if (bitmap >> 32) & bitmap:
                found.append(place.wrong(F.SUBCLUSTERS_CONTRADICT, offset >> self.bits, host=offset))
            if offset & (self.size - 1):
                has_data = bool(bitmap & _BITMAP_LOW) if self.extended else not entry & L.ENTRY_ZERO
                try:
                    if self._unaligned(place, offset, has_data, active, found):
                        # Whoever names the table next meets the entry as it is now.
                        self._wrong(1, *found[before:])
                        del found[before:]
                        continue
                except Stopped:
                    self.counters.corruptions += len(found)
                    for finding in found:
                        self.say(finding)
                    raise
            allocated += 1
            fragmented += bool(following) and offset != following
            following = offset + self.size
            if self.external:
                continue
            beyond = self._beyond(offset, self.size, place)
            if beyond is not None:
                found.append(beyond)
            else:
                self.count(offset, self.size, times)
        # A table may be named again, but by then nobody hears of more than there is room for.
        told = tuple(found[: max(0, self.room)])
        return _Seen(Scan(allocated + compressed, fragmented + compressed, compressed), told, len(found) - len(told))

    def _compressed(self, place: _Place, entry: int, bitmap: int, times: int, found: list[Finding]) -> bool:
        """Count a compressed cluster, and tell what is wrong with it; return whether it counts as allocated."""
        location, nbytes = L.compressed_location(entry, self.bits)
        if entry & L.COPIED:
            found.append(place.wrong(F.COMPRESSED_COPIED, location >> self.bits, host=location))
            entry ^= L.COPIED
        if self.external:
            found.append(place.wrong(F.COMPRESSED_WITH_DATA_FILE, index=place.index, entry=entry))
            return False
        if bitmap:
            found.append(place.wrong(F.COMPRESSED_SUBCLUSTERS, index=place.index, entry=entry))
            return False
        beyond = self._beyond(location, nbytes, place)
        if beyond is not None:
            found.append(beyond)
        else:
            self.count(location, nbytes, times)
        return True

    def _unaligned(self, place: _Place, offset: int, has_data: bool, active: bool, found: list[Finding]) -> bool:
        """Tell of an entry whose cluster is not aligned; True when it was repaired, so that it refers to nothing any more."""
        cluster = offset >> self.bits
        if has_data:
            found.append(place.wrong(F.DATA_UNALIGNED, cluster, host=offset))
            return False
        if self._zero_entry is None:
            found.append(place.wrong(F.PREALLOCATED_UNALIGNED, cluster, host=offset))
            return False
        # Said and counted at once: once repaired, nobody meets it again.
        self.say(place.wrong(F.PREALLOCATED_UNALIGNED, cluster, status=REPAIRED, host=offset))
        if self._zero_entry(place.table, place.index, active):
            self.counters.corruptions_fixed += 1
            return True
        self.counters.corruptions += 1
        return False

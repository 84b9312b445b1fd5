"""The snapshot table of qcow2 (QEMU ``docs/interop/qcow2``, "Snapshots"): reading it, its bytes, and where snapshots' L2 tables lie.

What is done with snapshots (create, apply, delete, read) is in ``snapshotting``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, ImageCorrupt, InvalidFormat, IOFailed

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.node.records import Finding, Say, SnapshotInfo

#: Extra data that is understood: size of the VM state, size of the disk, instruction count.
KNOWN_EXTRA = 24
#: Version 3 demands at least the first two of them.
REQUIRED_EXTRA = 16
NO_ICOUNT = (1 << 64) - 1
_READ_AHEAD = 64 << 10
#: QEMU keeps offsets inside the table in an int.
_MAX_TABLE_SPAN = (1 << 31) - 1


class Snapshot:
    """One entry of the snapshot table. Immutable by convention; ``unknown_extra`` is kept as it was found."""

    __slots__ = (
        "_id", "_name", "date_nsec", "date_sec", "disk_size", "extra_size", "icount", "l1_offset", "l1_size", "unknown_extra",
        "vm_clock_nsec", "vm_state_size",
    )  # fmt: skip

    def __init__(
        self,
        id: str | bytes,
        name: str | bytes,
        l1_offset: int,
        l1_size: int,
        disk_size: int,
        *,
        vm_state_size: int = 0,
        date_sec: int = 0,
        date_nsec: int = 0,
        vm_clock_nsec: int = 0,
        icount: int = NO_ICOUNT,
        extra_size: int = KNOWN_EXTRA,
        unknown_extra: bytes = b"",
    ) -> None:
        # As bytes: what is no text at all takes several times the space as one, and there may be 64 MiB of it.
        self._id = _encode_text(id) if isinstance(id, str) else id
        self._name = _encode_text(name) if isinstance(name, str) else name
        self.l1_offset = l1_offset
        self.l1_size = l1_size
        self.disk_size = disk_size
        self.vm_state_size = vm_state_size
        self.date_sec = date_sec
        self.date_nsec = date_nsec
        self.vm_clock_nsec = vm_clock_nsec
        self.icount = icount
        self.extra_size = extra_size  #: bytes of extra data in the file, known and unknown
        self.unknown_extra = unknown_extra

    @property
    def id(self) -> str:
        return _decode_text(self._id)

    @property
    def name(self) -> str:
        return _decode_text(self._name)

    @property
    def text_bytes(self) -> int:
        """Bytes of id and name."""
        return len(self._id) + len(self._name)

    @property
    def extra_data(self) -> bytes:
        """The extra data as it is written: never less than what is known."""
        return (
            L.U64.pack(self.vm_state_size) + L.U64.pack(self.disk_size) + L.U64.pack(self.icount) + self.unknown_extra
        )

    def encode(self) -> bytes:
        """Return the table entry, without the padding that follows it."""
        ident, name, extra = self._id, self._name, self.extra_data
        # What does not fit in 32 bits is a disk-only snapshot to readers that do not know the extra data.
        small_state = self.vm_state_size if self.vm_state_size < 1 << 32 else 0
        head = L.SNAPSHOT_HEADER.pack(
            self.l1_offset,
            self.l1_size,
            len(ident),
            len(name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            small_state,
            len(extra),
        )
        return head + extra + ident + name

    def info(self) -> SnapshotInfo:
        """Return what users see of it."""
        from cowhand.block.node.records import SnapshotInfo

        return SnapshotInfo(
            self.id, self.name, self.disk_size, self.vm_state_size, self.date_sec, self.date_nsec, self.vm_clock_nsec,
            None if self.icount == NO_ICOUNT else self.icount,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Snapshot {self.id} {self.name!r} of {self.disk_size} bytes>"


class Reading:
    """What reading a table found besides the snapshots: how much a repair has to leave out."""

    __slots__ = ("extra_dropped", "overhanging", "problem", "table_bytes")

    def __init__(self) -> None:
        self.table_bytes = 0
        self.overhanging = 0  #: snapshots left off the end: the table is too big
        self.extra_dropped = 0  #: entries whose extra data was cut
        self.problem: CowhandError | None = None  #: why entries are missing, where the others are wanted all the same


def _encode_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _text(data: bytes) -> bytes:
    """Return the text in *data*, which a zero byte ends before its length does."""
    return data.split(b"\0", 1)[0]


def encode_table(snapshots: list[Snapshot], *, path: str) -> bytes:
    """Return the table of *snapshots*. Raises InvalidFormat when it would be larger than may be read again."""
    table = bytearray()
    last: Snapshot | None = None
    for snapshot in snapshots:
        if snapshot is not last:
            last, entry = snapshot, snapshot.encode()
        table += bytes(-len(table) % 8)
        table += entry
        if len(table) > L.MAX_SNAPSHOT_TABLE_BYTES:
            raise InvalidFormat(
                f"the snapshot table would be larger than {L.MAX_SNAPSHOT_TABLE_BYTES} bytes",
                qemu="File too large",
                path=path,
                errno=27,
            )
    return bytes(table)


class _Window:
    """The bytes of the table, read ahead in pieces: a hostile header can make it up to 2 GiB long. Beyond the file's end lie zeroes."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._data):
            piece = bytearray(max(length, _READ_AHEAD))
            if offset < self._node.file.node.size:
                self._node.file.read_into(offset, piece)
            self._start, self._data, begin = offset, bytes(piece), 0
        return self._data[begin : begin + length]


def read_table(node: Qcow2Node, reading: Reading, repair: Say | None = None) -> list[Snapshot]:
    """Read the table that the header names. What is too much is left out, counted in *reading* and told to *repair*; without that InvalidFormat."""
    snapshots: list[Snapshot] = []
    _read_entries(node, reading, repair, snapshots)
    return snapshots


def read_what_is_there(node: Qcow2Node, reading: Reading) -> list[Snapshot]:
    """Read the table as far as the file has it and the medium gives it; what ended it is the *reading*'s problem. For who only reads."""
    snapshots: list[Snapshot] = []
    try:
        _read_entries(node, reading, None, snapshots)
    except (ImageCorrupt, IOFailed) as error:
        reading.problem = error
    return snapshots


def _read_entries(node: Qcow2Node, reading: Reading, repair: Say | None, snapshots: list[Snapshot]) -> None:
    header, path = node.header, node.filename
    count, begin = header.snapshot_count, header.snapshots_offset
    window = _Window(node)
    offset, length, text = begin, 0, 0
    alike: tuple[bytes, Snapshot] | None = None
    most = min(count, L.MAX_SNAPSHOTS)
    while len(snapshots) < most:
        index = len(snapshots)
        before = offset
        offset += -offset % 8
        length += -length % 8
        # A hostile table can be one entry, thousands of times: of zeroes, behind the end of the file.
        if alike is not None and window.read(offset, len(alike[0])) == alike[0]:
            if offset >= node.file.node.size and len(alike[0]) == L.SNAPSHOT_HEADER.size:
                # No entry is smaller, so they fit into the largest table.
                offset += (most - index) * L.SNAPSHOT_HEADER.size
                snapshots += [alike[1]] * (most - index)
                break
            snapshot, size = alike[1], len(alike[0])
            offset += size
        else:
            at = offset
            snapshot, offset, size = _read_entry(window, offset, index, node.header.size, reading, repair, path)
            alike = (window.read(at, size), snapshot) if size == offset - at < _READ_AHEAD else None
        if not node.cut_reads_as_zeroes and offset > node.file.node.size:
            raise ImageCorrupt(
                f"the file was cut off: it ends at {node.file.node.size:#x}, and the snapshot table has {count - index} more entries at {before:#x}",
                path=path, offset=before, qemu="Failed to read snapshot table", hint="Look at it with check.",
            )  # fmt: skip
        length += size
        text += snapshot.text_bytes
        if length > L.MAX_SNAPSHOT_TABLE_BYTES or offset - begin > _MAX_TABLE_SPAN or text > L.MAX_SNAPSHOT_TEXT_BYTES:
            left = count - index
            if repair is None:
                raise InvalidFormat(
                    f"the snapshot table is larger than {L.MAX_SNAPSHOT_TABLE_BYTES} bytes, or its text than {L.MAX_SNAPSHOT_TEXT_BYTES}",
                    qemu="Snapshot table is too big",
                    path=path, offset=begin, hint=f"A repair of everything removes the {left} snapshots that are too many.", errno=27,
                    advice=f"You can force-remove all {left} overhanging snapshots with qemu-img check -r all",
                )  # fmt: skip
            repair(_left_out("SNAPSHOTS_TOO_BIG", before, count=left))
            reading.overhanging += left
            offset = before
            break
        snapshots.append(snapshot)
    reading.table_bytes = offset - begin if count else 0


def _read_entry(
    window: _Window,
    offset: int,
    index: int,
    disk_size: int,
    reading: Reading,
    repair: Say | None,
    path: str,
) -> tuple[Snapshot, int, int]:
    """Return (snapshot, offset behind its entry, size that the entry has when it is written again)."""
    (l1_offset, l1_size, id_length, name_length, date_sec, date_nsec, clock, state_size, extra_size) = (
        L.SNAPSHOT_HEADER.unpack(window.read(offset, L.SNAPSHOT_HEADER.size))
    )
    at = offset
    offset += L.SNAPSHOT_HEADER.size
    kept = extra_size
    if extra_size > L.MAX_SNAPSHOT_EXTRA:
        if repair is None:
            raise InvalidFormat(
                f"entry {index} of the snapshot table has {extra_size} bytes of extra data, more than {L.MAX_SNAPSHOT_EXTRA}",
                qemu=f"Too much extra metadata in snapshot table entry {index}", path=path, offset=at,
                hint="A repair of everything cuts it.", errno=27,
                advice="You can force-remove this extra metadata with qemu-img check -r all",
            )  # fmt: skip
        repair(_left_out("SNAPSHOT_EXTRA", at, index=index, size=extra_size, limit=L.MAX_SNAPSHOT_EXTRA))
        reading.extra_dropped += 1
        kept = L.MAX_SNAPSHOT_EXTRA
    extra = window.read(offset, kept)
    offset += extra_size
    icount = NO_ICOUNT
    if kept >= 8:
        state_size = L.U64.unpack_from(extra)[0]
    if kept >= REQUIRED_EXTRA:
        disk_size = L.U64.unpack_from(extra, 8)[0]
    if kept >= KNOWN_EXTRA:
        icount = L.U64.unpack_from(extra, 16)[0]
    text = window.read(offset, id_length + name_length)
    snapshot = Snapshot(
        _text(text[:id_length]), _text(text[id_length:]), l1_offset, l1_size, disk_size,
        vm_state_size=state_size, date_sec=date_sec, date_nsec=date_nsec, vm_clock_nsec=clock, icount=icount,
        extra_size=kept, unknown_extra=extra[KNOWN_EXTRA:],
    )  # fmt: skip
    return snapshot, offset + len(text), L.SNAPSHOT_HEADER.size + kept + len(text)


def _left_out(kind: str, offset: int, **facts: int) -> Finding:
    from cowhand.block.formats.qcow2.ondisk import findings
    from cowhand.block.node.records import REPAIRED, Finding

    return Finding(getattr(findings, kind), REPAIRED, offset=offset, owner="the snapshot table", **facts)


def read_snapshots(node: Qcow2Node, *, for_repair: bool, reading: bool = False) -> tuple[list[Snapshot], int]:
    """Return the snapshots of *node* and the bytes of their table. Raises InvalidFormat naming entry and limit.

    For a check or repair nothing is read here: the check itself reads the table, and reports what is wrong with it. *reading* goes without those
    snapshots that cannot be read; ``node.snapshots_problem`` says why.
    """
    if for_repair or not node.header.snapshot_count:
        return [], 0
    found = Reading()
    if not reading:
        return read_table(node, found), found.table_bytes
    snapshots = read_what_is_there(node, found)
    node.snapshots_problem = found.problem
    if found.problem is not None:
        diagnostics.report(
            f"warning: '{node.filename}': not all snapshots can be read: {found.problem.message}", as_tool=True
        )
    return snapshots, found.table_bytes


def check_l1(node: Qcow2Node, snapshot: Snapshot) -> None:
    """Raise InvalidFormat unless *snapshot*'s L1 table may be read: its size and place keep the limits."""
    bad = None
    if snapshot.l1_size > L.MAX_L1_BYTES // L.ENTRY_SIZE:
        bad = "Snapshot L1 table too large"
    elif snapshot.l1_offset % node.cluster_size or snapshot.l1_offset + snapshot.l1_size * L.ENTRY_SIZE >= 1 << 63:
        bad = "Snapshot L1 table offset invalid"
    if bad is not None:
        raise InvalidFormat(
            f"snapshot '{snapshot.name}' has an L1 table of {snapshot.l1_size} entries at {snapshot.l1_offset:#x}, which is not possible",
            qemu=bad, path=node.filename, offset=snapshot.l1_offset, errno=27 if bad.endswith("large") else None,
        )  # fmt: skip


def read_l1(node: Qcow2Node, snapshot: Snapshot) -> bytes:
    """Return *snapshot*'s L1 table as it is on disk. Raises InvalidFormat when it cannot be one."""
    check_l1(node, snapshot)
    data = bytearray(snapshot.l1_size * L.ENTRY_SIZE)
    if data and snapshot.l1_offset < node.file.node.size:
        node.file.read_into(snapshot.l1_offset, data)
    return bytes(data)

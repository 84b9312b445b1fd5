"""The persistent bitmaps of a qcow2 image: the header extension and the bitmap directory (QEMU ``docs/interop/qcow2``, "Bitmaps").

Read leniently: an image whose directory is broken is an image all the same. What is sound of it is used, what is not is told of, kept as it
lies, and dropped by a repair. Rooms: ``bitmapdata`` tables and content, ``bitmapheader`` the switch in the header, ``bitmapstore`` writing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core import diagnostics
from cowhand.core.errors import BitmapUnusable, CowhandError, InvalidFormat

if TYPE_CHECKING:
    from cowhand.bitmaps.bitmap import Bitmap
    from cowhand.bitmaps.named import DirtyBitmap
    from cowhand.block.formats.qcow2.driver import Qcow2Node

IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4
RESERVED_FLAGS = 0xFFFFFFF8  #: specified
TYPE_DIRTY = 1  #: specified; the others are reserved
MAX_NAME = 1023  #: QEMU
MAX_DIRECTORY_BYTES = L.MAX_BITMAPS * (L.BITMAP_DIRECTORY_ENTRY.size + MAX_NAME)  #: QEMU
GRANULARITY_BITS = range(9, 32)  #: QEMU; the specification says 0 to 63
MAX_TABLE_ENTRIES = 0x8000000  #: QEMU
MAX_BITMAP_BYTES = 0x20000000  #: QEMU, of the clusters that one bitmap's table can name
#: Ours: of one image, those that follow its writes. Each costs time at every write, and memory.
MAX_RECORDING = 4096
#: Ours: content of all bitmaps of an image that is read and written anew, as QEMU does, when only one has changed; and words of their tables.
MAX_ANEW_BYTES = 64 << 20
MAX_ANEW_ENTRIES = 1 << 20
MAX_EXTRA_BYTES = 4096  #: ours; no extra data is specified yet

_OUTDATED_V2 = (
    "warning: This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent bitmap support; "
    "so now they must all be considered inconsistent"
)
_OUTDATED = (
    "warning: a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
)
_BROKEN = "Broken bitmap directory"
_EXTRA = "Bitmap extra data is not supported"
_ADVICE = "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."


class StoredBitmap:
    """One entry of the directory. ``at`` is its byte in the directory, -1 before it is stored; ``live`` the bitmap in memory.

    ``reason`` says why the bitmap cannot be used although the entry is well-formed: it is kept as it is.
    """

    __slots__ = ("at", "entries", "extra", "flags", "granularity_bits", "live", "name", "reason", "table")

    def __init__(self, name: bytes, granularity_bits: int) -> None:
        self.name = name
        self.granularity_bits = granularity_bits
        self.flags = AUTO
        self.table = 0
        self.entries = 0
        self.extra = b""
        self.at = -1
        self.live: DirtyBitmap | None = None
        self.reason: str | None = None

    @property
    def text(self) -> str:
        """The name as text."""
        return self.name.decode("utf-8", "surrogateescape")

    @property
    def in_use(self) -> bool:
        """Whether the stored form is out of date."""
        return bool(self.flags & IN_USE)

    def encode(self) -> bytes:
        """Return the directory entry."""
        head = L.BITMAP_DIRECTORY_ENTRY.pack(
            self.table, self.entries, self.flags, TYPE_DIRTY, self.granularity_bits, len(self.name), len(self.extra)
        )
        body = head + self.extra + self.name
        return body + bytes(-len(body) % 8)

    def info(self) -> dict[str, Any]:
        """Return QEMU's Qcow2BitmapInfo."""
        flags = ["in-use"] * bool(self.flags & IN_USE) + ["auto"] * bool(self.flags & AUTO)
        return {"name": self.text, "granularity": 1 << self.granularity_bits, "flags": flags}


class Problem(NamedTuple):
    """What is broken, in our words and in QEMU's, at ``offset`` of the file."""

    offset: int
    text: str
    qemu: str


class Directory:
    """What an image says of its bitmaps. ``problems`` tell what is broken; ``readable`` that its place is sound."""

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.entries: list[StoredBitmap] = []
        self.problems: list[Problem] = []
        self.present = False  #: the header names a directory that counts
        self.readable = False
        self.failure: CowhandError | None = None  #: why the medium does not give it
        self.unusable: list[StoredBitmap] = []  #: entries that are broken
        self.outdated = False  #: there is one, but the image was written without it
        self.offset = self.size = 0
        self.crowded = False  #: more bitmaps follow writes than are kept up to date
        #: Whenever one bitmap is stored all of them are, at new places: what QEMU does, which tests and scripts can see in ``map`` and ``measure``.
        self.anew = False
        self.removed: list[StoredBitmap] = []  #: taken away in memory, and not freed yet
        self.changed = False  #: entries were added or taken away in memory

    def __iter__(self) -> Iterator[StoredBitmap]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def broken(self) -> bool:
        """Whether something in the directory is not as it must be."""
        return bool(self.problems)

    def find(self, name: bytes) -> StoredBitmap | None:
        """Return the entry *name*, or None."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def encode(self) -> bytes:
        """Return the directory's bytes."""
        return b"".join(entry.encode() for entry in self.entries)

    def check_sound(self) -> None:
        """Raise BitmapUnusable when the directory is broken: it cannot be changed before it was repaired."""
        if self.problems:
            offset, text, _ = self.problems[0]
            raise BitmapUnusable(
                f"the bitmap directory is broken: {text}", qemu="Broken bitmap directory", path=self.node.filename, offset=offset,
                hint="Repair the image first: check --repair all keeps the bitmaps that are sound.",
            )  # fmt: skip


def read_directory(node: Qcow2Node) -> Directory:
    """Return the directory of *node*'s image, looked at but not into the bitmaps' tables. Raises nothing for what is broken."""
    out = Directory(node)
    header = node.header
    extension = header.find(L.EXT_BITMAPS)
    if extension is None:
        return out
    if header.version < 3 or not header.autoclear & L.AUTOCLEAR_BITMAPS:
        out.outdated = True
        return out
    out.present = True
    if len(extension) != L.BITMAP_EXTENSION.size:
        text = f"the header extension has {len(extension)} bytes instead of {L.BITMAP_EXTENSION.size}"
        out.problems.append(Problem(0, text, "bitmaps_ext: Invalid extension length"))
        return out
    count, reserved, out.size, out.offset = L.BITMAP_EXTENSION.unpack(extension)
    problem = _wrong_place(node, count, reserved, out.size, out.offset)
    if problem is not None:
        out.problems.append(Problem(out.offset, *problem))
        return out
    data = bytearray(out.size)
    try:
        node.file.read_into(out.offset, data)
    except CowhandError as error:
        out.failure = error
        text = f"Failed to read bitmap directory: {error.qemu_message}"
        out.problems.append(Problem(out.offset, f"it cannot be read: {error.message}", text))
        return out
    out.readable = True
    _parse(out, bytes(data), count)
    return out


def _wrong_place(node: Qcow2Node, count: int, reserved: int, size: int, offset: int) -> tuple[str, str] | None:
    """Say what is wrong with the header extension's fields, in our words and in QEMU's, or None."""
    if reserved:
        return f"a reserved field of the header extension is {reserved:#x}", "bitmaps_ext: Reserved field is not zero"
    if count > L.MAX_BITMAPS:
        qemu = f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {L.MAX_BITMAPS}"
        return f"{count} bitmaps are not possible, only 1 to {L.MAX_BITMAPS}", qemu
    if not count:
        return "a directory without bitmaps is not possible", "found bitmaps extension with zero bitmaps"
    if offset % node.cluster_size or not offset:
        return f"a directory cannot lie at {offset:#x}", "bitmaps_ext: invalid bitmap directory offset"
    if size > MAX_DIRECTORY_BYTES:
        qemu = f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({MAX_DIRECTORY_BYTES})"
        return f"a directory of {size} bytes is not possible", qemu
    if not size:
        return "a directory of no bytes is not possible", "Requested bitmap directory size is zero"
    if offset > node.file.node.size - size:
        return f"the directory of {size} bytes at {offset:#x} does not lie in the file", _BROKEN
    return None


def _parse(out: Directory, data: bytes, count: int) -> None:
    """Take the entries out of *data*; one whose length cannot be right ends it, since nothing behind it can be found."""
    head = L.BITMAP_DIRECTORY_ENTRY
    names: set[bytes] = set()
    at = number = 0
    while at < len(data):
        where = out.offset + at
        if number == count:
            text = f"it lists more than the {count} bitmaps that the header tells of"
            out.problems.append(Problem(where, text, "More bitmaps found than specified in header extension"))
            return
        if at + head.size > len(data):
            out.problems.append(Problem(where, "it ends inside an entry", _BROKEN))
            return
        table, entries, flags, kind, bits, name_length, extra = head.unpack_from(data, at)
        begin = at + head.size + extra
        end = begin + name_length
        end += -end % 8
        if end > len(data) or extra > MAX_EXTRA_BYTES:
            out.problems.append(Problem(where, f"entry {number} is longer than the directory", _BROKEN))
            return
        entry = StoredBitmap(data[begin : begin + name_length], bits)
        entry.table, entry.entries, entry.flags, entry.at = table, entries, flags, at
        entry.extra = data[at + head.size : begin]
        problem = _wrong_entry(out.node, entry, kind)
        if problem is None and entry.name in names:
            problem = "another one has the same name"
        names.add(entry.name)
        if problem is None:
            if extra and not flags & EXTRA_COMPATIBLE:
                entry.reason = "it has extra data that is not known"
            out.entries.append(entry)
        else:
            out.unusable.append(entry)
            qemu = _EXTRA if extra else f"Bitmap '{entry.text}' doesn't satisfy the constraints"
            out.problems.append(Problem(where, f"bitmap '{entry.text}': {problem}", qemu))
        at = end
        number += 1
    if number < count:
        text = f"it lists {number} bitmaps, and the header tells of {count}"
        out.problems.append(Problem(out.offset, text, "Less bitmaps found than specified in header extension"))


def serialized_bytes(size: int, granularity_bits: int) -> int:
    """Return how many bytes the content of a bitmap of a disk of *size* bytes has."""
    granules = -(-size >> granularity_bits)
    return (granules + 7) // 8


def needed_entries(node: Qcow2Node, size: int, granularity_bits: int) -> int:
    """Return how many table entries a bitmap of a disk of *size* bytes has."""
    return -(-serialized_bytes(size, granularity_bits) // node.cluster_size)


def _wrong_entry(node: Qcow2Node, entry: StoredBitmap, kind: int) -> str | None:
    """Say what is wrong with an entry's fields, or None."""
    size = node.cluster_size
    if kind != TYPE_DIRTY:
        return f"type {kind} is not known"
    if entry.flags & RESERVED_FLAGS:
        return f"reserved flags are set ({entry.flags:#x})"
    if not 0 < len(entry.name) <= MAX_NAME:
        return f"a name of {len(entry.name)} bytes is not possible"
    if entry.granularity_bits not in GRANULARITY_BITS:
        return f"a granularity of 2^{entry.granularity_bits} bytes is not supported"
    if not 0 < entry.entries <= MAX_TABLE_ENTRIES or entry.entries * size > MAX_BITMAP_BYTES:
        return f"a table of {entry.entries} entries is not possible"
    if not entry.table or entry.table % size:
        return f"a table cannot lie at {entry.table:#x}"
    if entry.table > node.file.node.size - entry.entries * L.ENTRY_SIZE:
        return f"the table at {entry.table:#x} does not lie in the file"
    if not entry.in_use and entry.entries != needed_entries(node, node.header.size, entry.granularity_bits):
        return f"a table of {entry.entries} entries does not fit the disk"
    return None


# -- what an open image has of them


def _refuse_as_qemu(node: Qcow2Node) -> None:
    """Raise InvalidFormat where QEMU does not open the image, with its first reason."""
    from cowhand.block.formats.qcow2.bitmap.data import read_table

    directory = node.bitmap_directory
    reasons = list(directory.problems)
    for entry in directory:
        where = directory.offset + entry.at
        if entry.extra:
            reasons.append(Problem(where, f"bitmap '{entry.text}' has extra data", _EXTRA))
        elif entry.flags & EXTRA_COMPATIBLE:
            qemu = f"Bitmap '{entry.text}' doesn't satisfy the constraints"
            reasons.append(Problem(where, f"bitmap '{entry.text}' has flags {entry.flags:#x}", qemu))
    if reasons:
        offset, text, qemu = min(reasons)
        raise InvalidFormat(
            f"the bitmap directory is broken: {text}", qemu=qemu, path=node.filename, offset=offset,
            hint="A repair of everything keeps the sound bitmaps and drops the rest.",
        )  # fmt: skip
    for entry in directory:
        if not entry.in_use:
            read_table(node, entry)


def load(node: Qcow2Node, *, as_qemu: bool = False) -> None:
    """Make the bitmaps that *node*'s header tells of the node's; their content is read when it is needed. The node is used by nobody yet.

    *as_qemu* raises InvalidFormat where QEMU does not open an image with such bitmaps; otherwise what is broken is told and passed over. With it,
    bitmaps are stored where QEMU would put them, within :data:`MAX_ANEW_BYTES`.
    """
    directory = node.bitmap_directory = read_directory(node)
    if directory.outdated:
        diagnostics.report(_OUTDATED_V2 if node.header.version < 3 else _OUTDATED, as_tool=True)
        diagnostics.report(_ADVICE)
    if as_qemu and directory.present:
        _refuse_as_qemu(node)
    # Thousands of problems have one name between them, which takes its time to put together.
    name = node.filename if directory.problems else ""
    for offset, text, _ in directory.problems:
        diagnostics.report(f"warning: '{name}': the bitmap directory is broken at {offset:#x}: {text}", as_tool=True)
    if not directory.entries:
        return
    from cowhand.bitmaps.named import BitmapSet

    node.dirty_bitmaps = known = BitmapSet()
    for entry in directory:
        if entry.reason is None:
            known.add(make_live(node, entry), refresh=False)
    directory.anew = as_qemu
    recording = sum(entry.flags & (AUTO | IN_USE) == AUTO for entry in directory)
    if recording > MAX_RECORDING:
        directory.crowded = True
        diagnostics.report(
            f"warning: '{node.filename}': {recording} bitmaps follow writes, more than {MAX_RECORDING}: they are out of date after the next write",
            as_tool=True,
        )  # fmt: skip
    # A broken directory is not kept up to date: what it tells of the bitmaps is marked as out of date by the first write.
    elif node.writable and not directory.broken:
        known.refresh()
        if known.active:
            node.hooks = (*node.hooks, known.mark)


def make_live(node: Qcow2Node, entry: StoredBitmap) -> DirtyBitmap:
    """Return the bitmap in memory of *entry*."""
    from cowhand.bitmaps.bitmap import Bitmap
    from cowhand.bitmaps.named import DirtyBitmap

    entry.live = DirtyBitmap(
        entry.text,
        Bitmap(node.header.size, 1 << entry.granularity_bits),
        enabled=bool(entry.flags & AUTO),
        persistent=True,
        inconsistent=entry.in_use,
        read_only=not node.writable or node.bitmap_directory.broken,
        source=partial(_read, node, entry),
    )
    return entry.live


def _read(node: Qcow2Node, entry: StoredBitmap, bits: Bitmap) -> None:
    from cowhand.block.formats.qcow2.bitmap.data import read_content

    read_content(node, entry, bits)


def list_bitmaps(node: Qcow2Node) -> list[dict[str, Any]]:
    """Return QEMU's Qcow2BitmapInfo of each bitmap that the image has stored; out-of-date and broken ones are not among them."""
    return [entry.info() for entry in node.bitmap_directory]

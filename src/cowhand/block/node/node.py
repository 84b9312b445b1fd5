"""The node: one layer of a disk (a protocol, a format or a filter), and the edge by which one node uses another.

Contract of every node: offsets and lengths are explicit and in bytes; I/O is total (the buffer is filled, all bytes are written, or an error
is raised); arguments inside the graph were checked at the gateway (:mod:`cowhand.block.disk`) and may be trusted; calls block, release
the interpreter lock while they wait, and may come from many threads at once.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

from cowhand.block.node.options import NodeOptions, strong_options
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError, NotSupported
from cowhand.core.extents import ALLOCATED, DATA, OFFSET, ExtentBatch

if TYPE_CHECKING:
    from cowhand.bitmaps.named import BitmapSet
    from cowhand.block.node.records import CheckResult, Say, SnapshotInfo
    from cowhand.block.opening.opening import Opening
    from cowhand.core.errors import CowhandError

_node_numbers = itertools.count()

# Permissions: what a user does with a node, and what it lets others do at the same time. The bit numbers are those of QEMU's image locks.
CONSISTENT_READ = 0x01
WRITE = 0x02
WRITE_UNCHANGED = 0x04
RESIZE = 0x08
ALL_PERMISSIONS = 0x0F

PERMISSION_NAMES = {
    CONSISTENT_READ: "consistent read",
    WRITE: "write",
    WRITE_UNCHANGED: "write unchanged",
    RESIZE: "resize",
}

# Requests of a batch: plain tuples, since making an object for each costs as much as the whole mapping.
#: (READ, offset, writable buffer), (WRITE, offset, buffer), (ZERO, offset, length), (ZERO_UNMAP, offset, length),
#: (DISCARD, offset, length), (FLUSH, 0, 0)
Request: TypeAlias = tuple[int, int, Any]
#: What of a batch failed: {index of the request: error}.
Failures: TypeAlias = dict[int, Exception]
READ, WRITE_REQUEST, ZERO_REQUEST, ZERO_UNMAP, DISCARD, FLUSH = range(6)


class Zeroing(IntEnum):
    """How a node can write zeroes."""

    NONE = 0
    EMULATED = 1  #: by writing bytes
    NATIVE = 2  #: without writing them


class Limits(NamedTuple):
    """Alignments and sizes of a node's I/O, in bytes. Offsets and lengths must be multiples of ``request_alignment``."""

    request_alignment: int = 1
    memory_alignment: int = 1  #: of the caller's buffers (direct I/O)
    preferred_io: int = 1 << 20
    maximum_io: int = 1 << 30
    zero_alignment: int = 1  #: smaller pieces are written as bytes
    discard_alignment: int = 1  #: smaller pieces are left alone


class Capabilities(NamedTuple):
    """What a node can do; computed once, when it is opened."""

    writable: bool = False
    zeroes: Zeroing = Zeroing.NONE
    discard: bool = False
    fua: bool = False
    resizable: bool = False


class Run(NamedTuple):
    """What a format says of a stretch that begins at the offset that was asked. Drivers may return the plain tuple.

    ``length`` bytes have ``flags`` (see :mod:`cowhand.core.extents`). With OFFSET they lie at ``host`` in ``child``; with COMPRESSED ``host``
    is the driver's own description. Without DATA and ZERO the content comes from the backing child, or is zero without one.
    """

    length: int
    flags: int
    child: Child | None
    host: int


class Role(IntEnum):
    """What a child is to its parent."""

    PRIMARY = 1  #: metadata and data: the format's file
    DATA = 2  #: data only: an external data file, an extent
    METADATA = 3
    BACKING = 4  #: what shows through where nothing is allocated
    FILTERED = 5  #: a filter's one child


#: An after-write hook: called with (offset, length) of every write, zero and discard, before it is acknowledged, on failure too.
Hook: TypeAlias = Callable[[int, int], None]


class Blocker(Protocol):
    """What refuses operations on nodes meanwhile (:class:`cowhand.block.graph.blockers.Blocker`)."""

    reason: str

    def refuses(self, node: BlockNode, operation: str) -> bool:
        """Tell whether *operation* on *node* is refused."""


class NodeTable(Protocol):
    """Where nodes are found by their names (:class:`cowhand.block.graph.names.NodeNames`)."""

    def forget(self, node: BlockNode) -> None:
        """Take a node out that was closed."""


class Reopening:
    """One node's part of a reopen (:mod:`cowhand.block.graph.reopen`): made by preparing, committed, perhaps undone, and always finished.

    Only preparing and :meth:`activate` may raise. Subclasses take what they need when they are made and give it back in :meth:`finish`.
    """

    def __init__(self, node: BlockNode, options: NodeOptions, writable: bool) -> None:
        self.node = node
        self._before = node.options, node.writable
        self._after = options, writable

    def commit(self) -> None:
        """Make the node what it is to be; its limits and capabilities are worked out afterwards (:meth:`BlockNode.refit`)."""
        self.node.options, self.node.writable = self._after

    def undo(self) -> None:
        """Take :meth:`commit` back."""
        self.node.options, self.node.writable = self._before

    def activate(self) -> None:
        """Do what the new state demands at once, over children that have theirs. May raise; everything is undone then."""

    def finish(self) -> None:
        """Give back what is not needed any more, after a commit, an undoing, or neither."""


class BlockNode(ABC):
    """One layer. Subclasses name what they can do; everything else refuses."""

    driver: ClassVar[str] = ""
    options_class: ClassVar[type[NodeOptions]] = NodeOptions
    is_filter: ClassVar[bool] = False
    is_format: ClassVar[bool] = False
    supports_backing: ClassVar[bool] = False
    #: Names of the driver's own options that :meth:`prepare_reopen` can change; the common ones always can.
    changeable: ClassVar[frozenset[str]] = frozenset()
    #: Whether the option "filename" is a path of the host, whatever it looks like.
    named_by_path: ClassVar[bool] = False
    #: Whether the node itself looks for zeroes in what is written, where its options ask for that.
    detects_zeroes: bool = False
    #: Requests may wait here of the node's own accord, see :meth:`hurry`.
    delays: ClassVar[bool] = False
    #: Whether a node without children does its requests at once: no other machine, user or limit is waited for.
    immediate: bool = False
    #: Whether the node can be used again after it was closed: its content is in memory alone.
    outlives_closing: ClassVar[bool] = False
    #: Whether a new image of this format reads as zeroes where nothing was written.
    zero_when_new: bool = True
    #: Bytes that the format allocates as one, where it tells of it.
    cluster_size: int | None = None

    def __init__(self, options: NodeOptions) -> None:
        self.options = options
        self.name = options.node_name or f"#block{next(_node_numbers):03d}"
        self.writable = not options.read_only
        self.limits = Limits()
        self.capabilities = Capabilities()
        self.children: dict[str, Child] = {}
        self.parents: list[Edge] = []
        self.hooks: tuple[Hook, ...] = ()
        #: Why :meth:`list_snapshots` does not tell of all that the image had: a part of it is missing, and it is only read.
        self.snapshots_problem: CowhandError | None = None
        self.dirty_bitmaps: BitmapSet | None = None  #: named bitmaps of this node, where it has any
        self.closed = False
        self.blockers: tuple[
            Blocker, ...
        ] = ()  #: what refuses operations on the node, see :mod:`cowhand.block.graph.blockers`
        self.table: NodeTable | None = None  #: where the node can be found by its name, if anywhere
        self.probed = False  #: the driver was chosen by looking at the bytes, not by the user
        #: A descriptor through which this node's bytes may be read and written at their own offsets, or -1 (see host_file).
        self.lane_fd = -1
        #: Where a format tells what it is about to do ("l2_load", QEMU's names); a blkdebug node below sets it, None costs nothing.
        self.event_sink: Callable[[str], None] | None = None

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> BlockNode:
        """Make a node as *options* say; *given* is what they do not declare: descriptions of children and what the driver reads by itself.

        The driver takes its keys out of *given*; what is left is refused. Children come from ``opening.child(node, name, description, role)``.
        An exception leaves nothing open but what ``opening`` closes.
        """
        raise NotSupported(f"driver '{cls.driver}' cannot be opened by options")

    @classmethod
    def backing_facts(cls, backing: BlockNode) -> dict[str, Any]:
        """Return what a new image over the open *backing* has to record of it, as further options of ``create``. Raises InvalidArgument."""
        return {}

    @classmethod
    def extent_names(cls, filename: str, size: int, options: Mapping[str, Any]) -> list[str]:
        """Return the files beside *filename* that a new image of that name is made of; each is made by :meth:`create_extent` first."""
        return []

    @classmethod
    def create_extent(cls, file: BlockNode, number: int, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, empty *file* the extent of that number, of an image of *size* bytes."""
        raise NotSupported(f"driver '{cls.driver}' makes no extents")

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """Return the options that a file name with this driver's prefix means (protocols and filters that have one)."""
        return {"filename": filename}

    # -- what every node answers

    @property
    @abstractmethod
    def size(self) -> int:
        """Length of this layer in bytes."""

    @property
    def filename(self) -> str:
        """The name by which this node could be opened again: a path, a URL, or a ``json:`` description.

        A format has the name of its file where opening that, as this format, gives this node again.
        """
        primary = self.primary
        if primary is None:
            return ""
        below = primary.node
        if self.is_format and (
            self.strong_options() or below.is_format or (name := below.filename).startswith("json:")
        ):
            from cowhand.block.node.naming import json_name

            return json_name(self)
        return name if self.is_format else below.filename

    def described_children(self) -> dict[str, Any]:
        """Return what a description of this node says of its children; not those that its own word leads to."""
        from cowhand.block.node.naming import describe

        return {name: describe(child.node) for name, child in self.children.items() if child.role is not Role.BACKING}

    def strong_options(self) -> dict[str, Any]:
        """Return {QEMU's name: value} of the options given that change what is read here."""
        return strong_options(self.options)

    @property
    def primary(self) -> Child | None:
        """The child that holds this node's own bytes (or the filtered one), or None."""
        for child in self.children.values():
            if child.role in (Role.PRIMARY, Role.FILTERED):
                return child
        return None

    @property
    def backing(self) -> Child | None:
        """The child that shows through where nothing is allocated, or None. A filter's filtered child is not one."""
        return self.children.get("backing")

    @property
    def backing_link(self) -> tuple[str, str | None] | None:
        """The backing file that the image itself records: its name as it is written, and its format if that is recorded; None for none."""
        return None

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        """Return (needed, shared) permissions on *child* when this node's own users need *perm* and share *shared*.

        The default is that of a format: a consistent, unshared file; a backing file that nobody may write.
        """
        writes = perm & (WRITE | WRITE_UNCHANGED | RESIZE)
        if child.role is Role.FILTERED:
            return perm, shared
        if child.role is Role.BACKING:
            return CONSISTENT_READ if perm & CONSISTENT_READ else 0, CONSISTENT_READ | WRITE_UNCHANGED | (
                (WRITE | RESIZE) if shared & WRITE else 0
            )
        need = CONSISTENT_READ
        if self.writable and (writes or child.role is not Role.DATA):
            need |= WRITE | RESIZE
        return need, shared & ~(WRITE | RESIZE)

    def update_permissions(self, perm: int, shared: int) -> None:
        """Learn the union of what this node's users need and share. Protocols take or give back image locks; may raise ImageInUse."""

    # -- data

    @abstractmethod
    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill the writable *buffer* with the bytes at *offset*. Beyond the end a protocol gives zeroes, up to its alignment."""

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        """Write *buffers*, one behind the other, at *offset*; with *fua* they are stable when it returns."""
        raise NotSupported(f"driver '{self.driver}' cannot write")

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        """Make the bytes read as zeroes; *unmap* allows giving their space back; without *fallback* raise NotSupported rather than write."""
        raise NotSupported(f"driver '{self.driver}' cannot write zeroes")

    def discard(self, offset: int, length: int) -> None:
        """Say that the bytes are no longer needed. Advisory: parts may be left as they were; a backing file is never exposed."""
        raise NotSupported(f"driver '{self.driver}' cannot discard")

    def flush(self) -> None:
        """Make everything stable that was acknowledged before the call. A failed flush fails the node until it is opened again."""
        raise NotSupported(f"driver '{self.driver}' cannot flush")

    def settle(self) -> None:
        """Flush, and bring to an end what was put off until no request is in flight. Called with all users held back."""
        self.flush()

    def hurry(self, on: bool) -> None:
        """Let requests pass that wait here of the node's own accord, until it is taken back: somebody waits for their end."""

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        """Do many requests, in any order and overlap that separate threads could have; return those that failed, or None.

        What is raised instead says that none of them can be relied on.
        """
        return one_by_one(self, batch)

    # -- what is where

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        """Describe this layer alone from *offset* on: at least one row, at most MAX_ROWS; may tell of less than *length* but not more.

        The default says that all of it is data of this node at the same offset.
        """
        batch = ExtentBatch()
        batch.add(offset, length, DATA | ALLOCATED | OFFSET, offset, self)
        return batch

    def host_file(self, run: Run) -> tuple[int, int] | None:
        """Return (descriptor, offset) of *run*'s bytes for the fast lane, or None: None unless a node grants it."""
        return None

    def extend(self, size: int, limit: int) -> None:
        """Make the node at least *size* bytes long while others write, not behind *limit*: all that they write stays. New bytes read as zeroes."""
        if self.size < size:
            self.resize(limit)

    def read_vmstate(self, offset: int, buffer: Buffer) -> None:
        """Fill *buffer* from the VM state, which lies outside of size, extents, convert and checksum."""
        raise NotSupported(f"driver '{self.driver}' keeps no VM state")

    def write_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write *buffers* to the VM state at *offset*."""
        raise NotSupported(f"driver '{self.driver}' keeps no VM state")

    # -- internal snapshots, and checks (see cowhand.image.snapshots and cowhand.image.check, which hold requests back)

    def snapshots_failure(self) -> CowhandError | None:
        """Return why the snapshots that this layer has cannot be read; None where they can, or there are none."""
        return None

    def list_snapshots(self) -> list[SnapshotInfo]:
        """Return the snapshots that this layer keeps inside itself."""
        raise self._no_snapshots()

    def create_snapshot(
        self,
        name: str,
        *,
        date: tuple[int, int] | None,
        vm_state_size: int,
        vm_clock_nsec: int,
        icount: int | None,
        ident: str | None,
    ) -> SnapshotInfo:
        """Make a snapshot of the present content."""
        raise self._no_snapshots()

    def apply_snapshot(self, ident: str, name: str) -> None:
        """Go back to a snapshot."""
        raise self._no_snapshots()

    def delete_snapshot(self, ident: str, name: str) -> None:
        """Forget a snapshot."""
        raise self._no_snapshots()

    def open_snapshot(self, ident: str, name: str) -> BlockNode:
        """Return a new read-only node, used by nobody yet, that shows a snapshot."""
        raise self._no_snapshots()

    def change_backing(self, name: str | None, format: str | None) -> None:
        """Record another backing file in the image, *name* with its *format* (None: no backing file any more); the open graph stays as it is."""
        raise NotSupported(
            f"format '{self.driver}' cannot record another backing file",
            qemu="Operation not supported",
            path=self.filename,
        )

    def bitmap_keeper(self) -> Any:
        """Return what keeps persistent bitmaps in this layer: ``add``, ``remove``, ``touch`` of (node, name, ...), ``possible`` and
        ``broken_reason`` of (node); None: nothing does."""
        return None

    def _no_snapshots(self) -> NotSupported:
        return NotSupported(
            f"format '{self.driver}' has no internal snapshots", qemu="Operation not supported", path=self.filename,
            hint="Put an overlay on the image instead.",
        )  # fmt: skip

    def check(self, repair: str | None, say: Say) -> CheckResult:
        """Check this layer's metadata and *repair* "leaks" or "all"; *say* gets everything that is found."""
        raise NotSupported(
            f"images of format '{self.driver}' cannot be checked", qemu="This image format does not support checks"
        )

    # -- life

    def prepare_reopen(self, options: NodeOptions, writable: bool) -> Reopening:
        """Get ready to have other *options* and to be *writable* or not. Raises where that cannot be; then nothing has changed."""
        return Reopening(self, options, writable)

    def refit(self) -> None:
        """Work out limits and capabilities anew, from ``options``, ``writable`` and the children."""
        self.capabilities = self.capabilities._replace(writable=self.writable)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        """Change the size; new bytes read as zeroes. Cutting data off needs *shrink*."""
        raise NotSupported(
            f"driver '{self.driver}' cannot be resized", qemu="Image format driver does not support resize"
        )

    def allocated_size(self) -> int | None:
        """Return the bytes that this layer occupies on its medium, or None where nobody can tell."""
        primary = self.primary
        return primary.node.allocated_size() if primary is not None else None

    def close(self) -> None:
        """Give back what the node holds, children first detached by the graph. Called once, without requests in flight."""

    def format_specific(self) -> Mapping[str, Any]:
        """Return what ``info`` prints of this driver alone, keys as in QEMU's JSON ("compat", "lazy-refcounts", ...); empty for most."""
        return {}

    def __repr__(self) -> str:
        return f"<{self.driver} {self.name} {self.filename!r}>"


def one_by_one(access: Any, batch: Sequence[Request]) -> Failures | None:
    """Do the requests of *batch* through *access* (a node, or a way to one) singly; return those that failed, or None."""
    failures: Failures | None = None
    for index, (kind, offset, what) in enumerate(batch):
        try:
            if kind == READ:
                access.read_into(offset, what)
            elif kind == WRITE_REQUEST:
                access.write(offset, (what,))
            elif kind == ZERO_REQUEST:
                access.write_zeroes(offset, what)
            elif kind == ZERO_UNMAP:
                access.write_zeroes(offset, what, unmap=True)
            elif kind == DISCARD:
                access.discard(offset, what)
            else:
                access.flush()
        except Exception as error:  # noqa: BLE001 - the caller is told which one it was
            if failures is None:
                failures = {}
            failures[index] = error
    return failures


class Edge:
    """A use of a node by somebody: another node (:class:`Child`) or a disk.

    The bound methods are those to call: they go straight to the node, or through padding where the node's alignment is coarser than
    what the user promises, and through the after-write hooks where the node has some. :mod:`cowhand.block.graph.graph` sets them.
    """

    #: whether the user is another node
    is_child: ClassVar[bool] = False

    __slots__ = (
        "discard", "flush", "lane", "name", "node", "perm", "read_into", "role", "shared", "submit", "write", "write_zeroes",
    )  # fmt: skip

    node: BlockNode
    lane: BlockNode | None  #: the node, where nothing stands between it and this user
    read_into: Callable[[int, Buffer], None]
    write: Callable[..., None]
    write_zeroes: Callable[..., None]
    discard: Callable[[int, int], None]
    flush: Callable[[], None]
    submit: Callable[[Sequence[Request]], Failures | None]

    def __init__(self, name: str, role: Role) -> None:
        self.name = name
        self.role = role
        self.perm = 0
        self.shared = ALL_PERMISSIONS

    @property
    def owner(self) -> Any:
        """Who uses the node: a node or a disk."""
        raise NotImplementedError

    @property
    def granularity(self) -> int:
        """Alignment that the user's requests keep to."""
        return 1


class Child(Edge):
    """A node's use of another node."""

    is_child: ClassVar[bool] = True

    __slots__ = ("parent",)

    def __init__(self, parent: BlockNode, name: str, role: Role) -> None:
        super().__init__(name, role)
        self.parent = parent

    @property
    def owner(self) -> BlockNode:
        return self.parent

    @property
    def granularity(self) -> int:
        # A filter hands on what it is given, so it promises what it asks of its own users.
        return self.parent.limits.request_alignment


def walk(nodes: Iterable[BlockNode]) -> list[BlockNode]:
    """Return *nodes* and everything below them, each once, parents before children."""
    seen: dict[int, BlockNode] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            stack.extend(child.node for child in node.children.values())
    return list(seen.values())

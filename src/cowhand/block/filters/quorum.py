"""The driver "quorum": the same disk in several places, of which enough must agree.

Source: QEMU's ``BlockdevOptionsQuorum`` and ``docs/block-replication.txt``. Reads ask every child and take what at least ``vote-threshold`` of them
say, or with ``read-pattern=fifo`` the first child that answers; writes go to all and succeed when ``vote-threshold`` of them did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.access.range_locks import RangeLocks
from cowhand.block.graph.block_status import layered
from cowhand.block.node.naming import describe, json_name
from cowhand.block.node.node import CONSISTENT_READ, WRITE, BlockNode, Capabilities, Child, Limits, Role
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError, InvalidArgument, IOFailed, VerificationFailed
from cowhand.core.extents import ALLOCATED, DATA, MAX_ROWS, ZERO, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening

#: Copies of one disk; each costs a buffer of a request's length.
MAX_CHILDREN = 64


class QuorumOptions(NodeOptions):
    """Options of the driver but the children."""

    vote_threshold: int = option(0, kind="int", help="how many children must agree")
    blkverify: bool = option(False, kind="bool", help="fail for good at the first difference (two children)")
    rewrite_corrupted: bool = option(False, kind="bool", help="write what was agreed on over what differs")
    read_pattern: str = option("quorum", help="quorum, or fifo: the first child that can be read")


class QuorumNode(BlockNode):
    """Several children that hold the same bytes. ``listener`` is told ("report-bad" or "failure", facts) of what QEMU has events for."""

    driver: ClassVar[str] = "quorum"
    options_class: ClassVar[type[NodeOptions]] = QuorumOptions
    options: QuorumOptions
    failure: VerificationFailed | None = None

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.listener: Callable[[str, Mapping[str, Any]], None] | None = None
        #: Overlapping writes reach every child in the same order; and what differs is looked at again without any.
        self._ranges = RangeLocks()

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> QuorumNode:
        assert isinstance(options, QuorumOptions)
        node = cls(options)
        opening.track(node)
        descriptions = _listed(given.pop("children", None))
        node._check(len(descriptions))
        for number, description in enumerate(descriptions):
            before, opening.probing = opening.probing, True
            with opening.aside():
                child = opening.child(node, f"children.{number}", description, Role.FILTERED)
            opening.probing = before
            child.role = Role.DATA
        node.start()
        return node

    def _check(self, count: int) -> None:
        options = self.options
        if count > MAX_CHILDREN:
            raise InvalidArgument(f"a quorum has at most {MAX_CHILDREN} children")
        if options.vote_threshold < 1:
            raise InvalidArgument("Parameter 'vote-threshold' expects a value >= 1")
        if options.vote_threshold > count:
            raise InvalidArgument("threshold may not exceed children count")
        if options.read_pattern not in ("quorum", "fifo"):
            raise InvalidArgument("Please set read-pattern as fifo or quorum")
        if options.read_pattern == "quorum" and options.blkverify:
            if count != 2 or options.vote_threshold != 2:
                raise InvalidArgument(
                    "blkverify=on can only be set if there are exactly two files and vote-threshold is 2"
                )
            if options.rewrite_corrupted:
                raise InvalidArgument("rewrite-corrupted=on cannot be used with blkverify=on")

    def refit(self) -> None:
        self.start()

    def start(self) -> None:
        """Take over what all children can do. Raises IOFailed where their sizes differ."""
        nodes = [child.node for child in self.voters]
        if len({node.size for node in nodes}) > 1:
            raise IOFailed(
                "the children of the quorum differ in size: " + ", ".join(f"{n.filename}: {n.size}" for n in nodes),
                qemu="Could not refresh total sector count: Input/output error",
            )
        self.limits = Limits(
            request_alignment=max(node.limits.request_alignment for node in nodes),
            memory_alignment=max(node.limits.memory_alignment for node in nodes),
            preferred_io=min(node.limits.preferred_io for node in nodes),
        )
        self.writable = self.writable and all(node.writable for node in nodes)
        self.capabilities = Capabilities(
            writable=self.writable,
            zeroes=min(node.capabilities.zeroes for node in nodes),
            fua=all(node.capabilities.fua for node in nodes),
        )

    @property
    def voters(self) -> list[Child]:
        """The edges to the children, in the order in which they were given."""
        return list(self.children.values())

    @property
    def size(self) -> int:
        return self.voters[0].node.size

    @property
    def filename(self) -> str:
        return json_name(self)

    def described_children(self) -> dict[str, Any]:
        return {"children": [describe(child.node) for child in self.voters]}

    def allocated_size(self) -> int | None:
        sizes = [child.node.allocated_size() for child in self.voters]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        # As in QEMU: what is not the same everywhere is not to be written by somebody else.
        if self.options.rewrite_corrupted and self.writable:
            perm |= WRITE
        return perm | CONSISTENT_READ, shared & ~(WRITE)

    # -- votes

    def _tell(self, what: str, **facts: Any) -> None:
        if self.listener is not None:
            self.listener(what, facts)

    def _on_all(self, kind: str, offset: int, length: int, work: Callable[[Child], None]) -> list[Child]:
        """Do *work* on every child; return those that did it. Raises the commonest error where they are too few."""
        if self.failure is not None:
            raise self.failure
        good: list[Child] = []
        errors: list[CowhandError] = []
        for child in self.voters:
            try:
                work(child)
            except CowhandError as error:
                errors.append(error)
                self._tell("report-bad", type=kind, node=child.node.name, offset=offset, length=length, error=error)
            else:
                good.append(child)
        if len(good) >= self.options.vote_threshold:
            return good
        self._tell("failure", node=self.name, offset=offset, length=length)
        number = Counter(error.number for error in errors).most_common(1)[0][0]
        raise next(error for error in errors if error.number == number)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        if self.options.read_pattern == "fifo":
            self._read_first(offset, buffer)
            return
        length = len(buffer)
        good, ballots = self._ask(offset, length)
        winner = ballots[0]
        if any(ballot != winner for ballot in ballots[1:]):
            # A write may have been under way.
            with self._ranges.hold(offset, length):
                good, ballots = self._ask(offset, length)
                winner = ballots[0]
                if any(ballot != winner for ballot in ballots[1:]):
                    winner = self._count(offset, length, good, ballots)
        memoryview(buffer)[:] = winner

    def _ask(self, offset: int, length: int) -> tuple[list[Child], list[bytearray]]:
        """Return the children that could be read, and what they say."""
        answers: dict[int, bytearray] = {}

        def ask(child: Child) -> None:
            answer = bytearray(length)
            child.read_into(offset, answer)
            answers[id(child)] = answer

        good = self._on_all("read", offset, length, ask)
        return good, [answers[id(child)] for child in good]

    def _count(self, offset: int, length: int, good: list[Child], ballots: list[bytearray]) -> bytearray:
        """Return what most children say, and deal with those that say something else. Raises IOFailed without enough votes."""
        if self.options.blkverify:
            first = next(i for i, pair in enumerate(zip(*ballots, strict=True)) if pair[0] != pair[1])
            self.failure = VerificationFailed(
                f"quorum: offset={offset} bytes={length} contents mismatch at offset {offset + first}",
                path=self.filename, offset=offset,
            )  # fmt: skip
            raise self.failure
        votes = [sum(other == ballot for other in ballots) for ballot in ballots]
        winner = ballots[votes.index(max(votes))]
        if max(votes) < self.options.vote_threshold:
            self._tell("failure", node=self.name, offset=offset, length=length)
            raise IOFailed(
                f"only {max(votes)} of the {self.options.vote_threshold} children that must agree do",
                qemu="Input/output error", path=self.filename, offset=offset,
            )  # fmt: skip
        for child, ballot in zip(good, ballots, strict=True):
            if ballot != winner:
                self._tell("report-bad", type="read", node=child.node.name, offset=offset, length=length, error=None)
                if self.options.rewrite_corrupted and self.writable:
                    self._rewrite(child, offset, winner)
        return winner

    def _rewrite(self, child: Child, offset: int, data: bytearray) -> None:
        try:
            child.write(offset, (data,))
        except CowhandError as error:
            self._tell("report-bad", type="write", node=child.node.name, offset=offset, length=len(data), error=error)

    def _read_first(self, offset: int, buffer: Buffer) -> None:
        last: CowhandError | None = None
        for child in self.voters:
            try:
                child.read_into(offset, buffer)
            except CowhandError as error:
                last = error
                self._tell(
                    "report-bad", type="read", node=child.node.name, offset=offset, length=len(buffer), error=error
                )
            else:
                return
        assert last is not None
        raise last

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        # A buffer may change under the request: all get the same bytes.
        data = b"".join(buffers)
        with self._ranges.hold(offset, len(data)):
            self._on_all("write", offset, len(data), lambda child: child.write(offset, (data,), fua))

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        def zero(child: Child) -> None:
            child.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

        with self._ranges.hold(offset, length):
            self._on_all("write", offset, length, zero)

    def flush(self) -> None:
        self._on_all("flush", 0, self.size, lambda child: child.flush())

    def settle(self) -> None:
        self._on_all("flush", 0, self.size, lambda child: child.node.settle())

    # -- what is where

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        """Zeroes are where every child has some; the rest is data."""
        end = offset + length
        zeroes = [(offset, end)]
        for child in self.voters:
            told = layered(child.node, offset, end - offset)
            end = told.end
            zeroes = list(_common(zeroes, told))
        batch = ExtentBatch()
        position = offset
        for begin, stop in zeroes:
            if len(batch) > MAX_ROWS - 3:
                return batch
            if begin > position:
                batch.add(position, begin - position, DATA | ALLOCATED, position, self)
            batch.add(begin, stop - begin, ZERO | ALLOCATED, begin, self)
            position = stop
        if position < end:
            batch.add(position, end - position, DATA | ALLOCATED, position, self)
        return batch


def _common(ranges: list[tuple[int, int]], told: ExtentBatch) -> Iterator[tuple[int, int]]:
    """Yield what of *ranges*, which rise, *told* says is zero."""
    rows = iter(ranges)
    begin, end = next(rows, (told.end, told.end))
    for start, length, flags in zip(told.start, told.length, told.flags, strict=True):
        stop = start + length
        while begin < stop:
            if flags & ZERO and end > start:
                yield max(begin, start), min(end, stop)
            if end > stop:
                break
            begin, end = next(rows, (told.end, told.end))


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        if sorted(value, key=str) != sorted(map(str, range(len(value))), key=str):
            raise InvalidArgument("Option children is not a valid array")
        value = [value[str(number)] for number in range(len(value))]
    if value is not None and not isinstance(value, (list, tuple)):
        raise InvalidArgument("Option children is not a valid array")
    if not value:
        raise InvalidArgument("Number of provided children must be 1 or more")
    return list(value)

"""The filter "blkverify": does everything to two images and compares what is read; for finding errors of a format's driver.

Source: QEMU's ``docs/devel/blkverify.txt`` and ``BlockdevOptionsBlkverify``: "raw" is the known good copy, "test" the image under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.access.range_locks import RangeLocks
from cowhand.block.filters.base import FilterNode
from cowhand.block.node.naming import json_name
from cowhand.block.node.node import BlockNode, Child, Role
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError, InvalidArgument, VerificationFailed
from cowhand.core.extents import ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening


class BlkVerifyOptions(NodeOptions):
    """What a file name "blkverify:RAW:TEST" means."""

    x_raw: str | None = option(help="file name of the raw copy (internal use)", strong=False)
    x_image: str | None = option(help="file name of the image under test (internal use)", strong=False)


class BlkVerifyNode(FilterNode):
    """Raises VerificationFailed when the two differ, in what is read or in whether a request succeeds; then nothing more is done.

    It does not discard: what was discarded may read differently on either side.
    """

    driver: ClassVar[str] = "blkverify"
    options_class: ClassVar[type[NodeOptions]] = BlkVerifyOptions
    child_name: ClassVar[str] = "raw"
    options: BlkVerifyOptions
    failure: VerificationFailed | None = None

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        #: Overlapping writes reach both in the same order; and what differs is looked at again without any.
        self._ranges = RangeLocks()

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> BlkVerifyNode:
        assert isinstance(options, BlkVerifyOptions)
        node = cls(options)
        opening.track(node)
        for name, filename, role in (("raw", options.x_raw, Role.PRIMARY), ("test", options.x_image, Role.FILTERED)):
            description = given.pop(name, None)
            if filename is not None:
                inner = description if isinstance(description, dict) else {}
                description = {**opening.describe(filename), **inner}
            if description is None:
                raise InvalidArgument(f'A block device must be specified for "{name}"')
            # The format of the image under test is looked for wherever this filter stands; the raw copy's is not.
            before, opening.probing = opening.probing, True
            with opening.aside():
                child = opening.child(node, name, description, role)
            opening.probing = before
            child.role = Role.FILTERED if name == "raw" else Role.DATA
        node.start()
        return node

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        if not filename.startswith("blkverify:"):
            return {"x-image": filename}
        raw, colon, test = filename[len("blkverify:") :].partition(":")
        if not colon:
            raise InvalidArgument("blkverify requires raw copy and original image path")
        return {"x-raw": raw, "x-image": test}

    def start(self) -> None:
        super().start()
        raw, test = self.below.node, self.test.node
        block = max(raw.limits.request_alignment, test.limits.request_alignment)
        self.limits = raw.limits._replace(request_alignment=block, preferred_io=test.limits.preferred_io)
        self.writable = self.writable and test.writable
        self.capabilities = self.capabilities._replace(
            writable=self.writable,
            discard=False,
            zeroes=min(raw.capabilities.zeroes, test.capabilities.zeroes),
            resizable=raw.capabilities.resizable and test.capabilities.resizable,
        )

    @property
    def test(self) -> Child:
        """The edge to the image under test."""
        return self.children["test"]

    @property
    def size(self) -> int:
        return self.test.node.size

    @property
    def filename(self) -> str:
        if "test" not in self.children:
            return ""
        names = [self.below.node.filename, self.test.node.filename]
        if any(name.startswith("json:") or not name for name in names):
            return json_name(self)
        return ":".join(("blkverify", *names))

    def allocated_size(self) -> int | None:
        return None  # as in QEMU: there are two files

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        return perm, shared

    def _fail(self, what: str, offset: int, length: int, text: str) -> VerificationFailed:
        self.failure = VerificationFailed(
            f"blkverify: {what} offset={offset} bytes={length} {text}", path=self.filename, offset=offset
        )
        return self.failure

    def _both(self, what: str, offset: int, length: int, raw: Callable[[], None], test: Callable[[], None]) -> None:
        if self.failure is not None:
            raise self.failure
        errors: list[CowhandError | None] = []
        for work in (raw, test):
            try:
                work()
            except CowhandError as error:
                errors.append(error)
            else:
                errors.append(None)
        numbers = [-error.number if error is not None else 0 for error in errors]
        if numbers[0] != numbers[1]:
            raise self._fail(what, offset, length, f"return value mismatch {numbers[1]} != {numbers[0]}") from (
                errors[1] or errors[0]
            )
        if errors[1] is not None:
            raise errors[1]

    def read_into(self, offset: int, buffer: Buffer) -> None:
        if self._agree(offset, buffer) is None:
            return
        # A write may have been under way.
        with self._ranges.hold(offset, len(buffer)):
            good = self._agree(offset, buffer)
        if good is not None:
            found = bytes(buffer)
            first = next(index for index, pair in enumerate(zip(found, good, strict=True)) if pair[0] != pair[1])
            raise self._fail("read", offset, len(good), f"contents mismatch at offset {offset + first}")

    def _agree(self, offset: int, buffer: Buffer) -> bytearray | None:
        """Fill *buffer* from the image under test; return what the raw copy says where that is something else."""
        good = bytearray(len(buffer))
        below, test = self.below, self.test
        self._both(
            "read",
            offset,
            len(good),
            lambda: below.read_into(offset, good),
            lambda: test.read_into(offset, buffer),
        )
        return good if bytes(buffer) != good else None

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        # A buffer may change under the request: both get the same bytes.
        data = b"".join(buffers)
        below, test = self.below, self.test
        with self._ranges.hold(offset, len(data)):
            self._both(
                "write",
                offset,
                len(data),
                lambda: below.write(offset, (data,), fua),
                lambda: test.write(offset, (data,), fua),
            )

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        def zero(child: Child) -> Callable[[], None]:
            return lambda: child.write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

        with self._ranges.hold(offset, length):
            self._both("write", offset, length, zero(self.below), zero(self.test))

    def flush(self) -> None:
        self._both("flush", 0, 0, self.below.flush, self.test.flush)

    def settle(self) -> None:
        self._both("flush", 0, 0, self.below.node.settle, self.test.node.settle)

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        return self.below.node.map_batch(offset, length)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        def change(node: BlockNode) -> Callable[[], None]:
            return lambda: node.resize(size, preallocation=preallocation, shrink=shrink)

        self._both("truncate", 0, size, change(self.below.node), change(self.test.node))

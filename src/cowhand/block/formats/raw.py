"""The raw format: the bytes of the disk as they are, all of them or a window (``offset``, ``size``).

A raw image whose format was guessed, not named, does not let a guest turn it into another format: a write that would give its first
sector another format's header is refused, as in QEMU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.node.create_options import FILE_OPTIONS, CreateOption
from cowhand.block.node.node import (
    DISCARD,
    WRITE_REQUEST,
    ZERO_REQUEST,
    ZERO_UNMAP,
    BlockNode,
    Child,
    Failures,
    Request,
    Role,
)
from cowhand.block.node.options import NodeOptions, option
from cowhand.block.opening.signatures import looks_like_a_format
from cowhand.core.buffers import Buffer
from cowhand.core.errors import AccessDenied, InvalidArgument, NotSupported
from cowhand.core.extents import DATA, ZERO, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening


#: Requests that may change the first sector.
_CHANGES = (WRITE_REQUEST, ZERO_REQUEST, ZERO_UNMAP, DISCARD)


class RawOptions(NodeOptions):
    """Options of a raw image (QEMU ``qapi/block-core.json``, BlockdevOptionsRaw)."""

    offset: int | None = option(kind="size", help="where in the file the disk begins")
    size: int | None = option(kind="size", help="length of the disk; from offset to the end where it is not given")


class RawNode(BlockNode):
    """A raw image: hands everything to its file, shifted by ``offset``."""

    driver: ClassVar[str] = "raw"
    options_class: ClassVar[type[NodeOptions]] = RawOptions
    is_format: ClassVar[bool] = True
    create_options: ClassVar[tuple[CreateOption, ...]] = tuple(
        o for o in FILE_OPTIONS if o.name in ("size", "preallocation")
    )
    options: RawOptions
    file: Child

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* exactly *size* bytes of zeroes."""
        cls.check_creation(size, options)
        make_empty(file, size, preallocation=options.get("preallocation", "off"))

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise what is wrong with *options*."""
        mode = options.get("preallocation", "off")
        if mode not in ("off", "falloc", "full"):
            qemu = (
                f"Unsupported preallocation mode: {mode}" if mode == "metadata" else f"invalid parameter value: {mode}"
            )
            raise InvalidArgument(
                f"a raw image cannot be preallocated as '{mode}'",
                qemu=qemu,
                hint="preallocation is off, falloc or full.",
            )

    @classmethod
    def measure(
        cls,
        options: Mapping[str, Any],
        size: int | None,
        source_size: int | None,
        data_in_units: Callable[[int], int] | None,
    ) -> tuple[int, int, int]:
        """Return (required, fully allocated, allocation unit) of a new image: holes count towards the length of a raw file."""
        total = -(-(size or 0) // 512) * 512 if source_size is None else -(-source_size // 512) * 512
        return total, total, 1

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> RawNode:
        assert isinstance(options, RawOptions)
        node = cls(options)
        file = given.pop("file", None)
        if file is None:
            raise InvalidArgument("a raw image needs a 'file'", qemu='A block device must be specified for "file"')
        if given.pop("backing", None) is not None:
            raise NotSupported("Driver doesn't support backing files")
        opening.track(node)
        node.file = opening.child(node, "file", file, Role.PRIMARY)
        node.start()
        return node

    def start(self) -> None:
        """Take over what the file can do, and find the way that requests go."""
        lower = self.file.node
        below = lower.size
        offset, size = self.options.offset or 0, self.options.size
        if offset > below:
            raise InvalidArgument(
                f"Offset ({offset}) cannot be greater than size of the containing file ({below})", path=lower.filename
            )
        if size is not None and size > below - offset:
            raise InvalidArgument(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the actual size of the containing file ({below})",
                qemu=f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
                f" actual size of the containing file ({below})",
                path=lower.filename,
            )
        if size is not None and size % 512:
            raise InvalidArgument(
                f"the size ({size}) is not a multiple of 512", qemu="Specified size is not multiple of 512", path=lower.filename
            )  # fmt: skip
        self.offset = offset
        self.zero_when_new = lower.zero_when_new
        self.limits = lower.limits
        # An offset that is no multiple of the file's alignment: requests are padded above the file instead.
        if offset % max(1, lower.limits.request_alignment):
            self.limits = lower.limits._replace(request_alignment=1)
        self.capabilities = lower.capabilities._replace(
            writable=self.writable, resizable=lower.capabilities.resizable and size is None
        )
        self.lane_fd = lower.lane_fd if self.file.lane is not None and not offset else -1

    changeable: ClassVar[frozenset[str]] = frozenset(("offset", "size"))

    def refit(self) -> None:
        self.start()
        if self.probed and self.writable:
            self.lane_fd = -1

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        # Without a format's metadata there is nothing to protect but what the users themselves protect.
        if self.options.offset or self.options.size is not None:
            return super().child_permissions(child, perm, shared)
        return perm, shared

    @property
    def size(self) -> int:
        if self.options.size is not None:
            return self.options.size
        return max(0, self.file.node.size - (self.options.offset or 0))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        if self.event_sink is not None:
            self.event_sink("read_aio")
        self.file.read_into(offset + self.offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        if self.event_sink is not None:
            self.event_sink("write_aio")
        if offset < 512 and self.probed:
            self._check_header(offset, buffers)
        self.file.write(offset + self.offset, buffers, fua)

    def _check_header(self, offset: int, buffers: Sequence[Buffer]) -> None:
        first = bytearray(512)
        if offset or sum(len(b) for b in buffers) < 512:
            self.file.read_into(self.offset, memoryview(first)[: min(512, self.size)])
        position = offset
        for buffer in buffers:
            piece = bytes(memoryview(buffer)[: max(0, 512 - position)])
            first[position : position + len(piece)] = piece
            position += len(piece)
        name = looks_like_a_format(bytes(first))
        if name is not None:
            raise AccessDenied(
                f"this write would make the image look like a {name} image the next time its format is guessed",
                qemu="Operation not permitted", errno=1, path=self.filename, offset=offset, hint="Name the format as raw when you open it.",
            )  # fmt: skip

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if offset < 512 and self.probed:
            self._check_header(offset, (bytes(min(length, 512)),))
        self.file.write_zeroes(offset + self.offset, length, unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        if offset < 512 and self.probed:
            # What is discarded may read as zeroes.
            self._check_header(offset, (bytes(min(length, 512)),))
        self.file.discard(offset + self.offset, length)

    def flush(self) -> None:
        if self.event_sink is not None:
            self.event_sink("flush_to_os")
            self.event_sink("flush_to_disk")
        self.file.flush()

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        if self.offset or self.event_sink is not None or self.probed:
            guarded = self.event_sink is not None or any(o < 512 and k in _CHANGES for k, o, _ in batch)
            if guarded:
                return super().submit(batch)
            if self.offset:
                batch = [(kind, offset + self.offset if kind != 5 else 0, what) for kind, offset, what in batch]
        return self.file.submit(batch)

    def read_vmstate(self, offset: int, buffer: Buffer) -> None:
        self.file.node.read_vmstate(offset, buffer)

    def write_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.file.node.write_vmstate(offset, buffers)

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        below = self.file.node
        told = below.map_batch(offset + self.offset, length)
        if below.is_format or below.is_filter:
            from cowhand.block.graph.block_status import skip_filters

            layer = skip_filters(below)
            nothing = ZERO if layer.supports_backing and layer.backing is None else 0
        else:
            nothing = 0
        if not self.offset and not nothing:
            return told
        out = ExtentBatch()
        for row in told:
            flags = row.flags if row.flags & (DATA | ZERO) else row.flags | nothing
            out.add(row.start - self.offset, row.length, flags, row.host, row.node)
        return out

    def host_file(self, run: Any) -> tuple[int, int] | None:
        return self.file.node.host_file(run)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if self.options.size is not None:
            raise NotSupported("Cannot resize fixed-size raw disks", path=self.filename)
        self.file.node.resize(size + self.offset, preallocation=preallocation, shrink=shrink)

"""The filter "blkdebug": makes requests fail, waits with them, or limits them, as rules and breakpoints say.

Source: QEMU's ``docs/devel/blkdebug.txt`` and ``BlockdevOptionsBlkdebug``. The format above a blkdebug node tells it what it is about to do
("l2_update", ...) through ``event_sink``; :mod:`cowhand.block.filters.blkdebug.rules` says what follows.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.access.bind import bind
from cowhand.block.filters.base import PassingFilter
from cowhand.block.filters.blkdebug.config import as_list, from_options, read_file
from cowhand.block.filters.blkdebug.rules import EVENTS, Engine, InjectError, Suspend
from cowhand.block.node.naming import json_name
from cowhand.block.node.node import (
    CONSISTENT_READ,
    RESIZE,
    WRITE,
    WRITE_UNCHANGED,
    BlockNode,
    Child,
    Limits,
    Role,
    Zeroing,
)
from cowhand.block.node.options import NodeOptions, flatten, option
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer
from cowhand.core.errors import InvalidArgument, NotSupported, PolicyRefused, from_os_error
from cowhand.core.extents import ExtentBatch
from cowhand.core.locks import RANK_LEAF, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening

_PERMISSIONS = {
    "consistent-read": CONSISTENT_READ,
    "write": WRITE,
    "write-unchanged": WRITE_UNCHANGED,
    "resize": RESIZE,
}
_INT_MAX = (1 << 31) - 1


class BlkDebugOptions(NodeOptions):
    """Options that have one value; rules and permissions are lists and are read by the driver."""

    config: str | None = option(help="path to the configuration file")
    x_image: str | None = option(
        help="file name of the image (internal use: the second part of 'blkdebug:CONFIG:IMAGE')"
    )
    align: int = option(0, kind="size", help="required alignment in bytes")
    max_transfer: int = option(0, kind="size", help="maximum transfer size in bytes")
    opt_write_zero: int = option(0, kind="size", help="optimum write zero alignment in bytes")
    max_write_zero: int = option(0, kind="size", help="maximum write zero size in bytes")
    opt_discard: int = option(0, kind="size", help="optimum discard alignment in bytes")
    max_discard: int = option(0, kind="size", help="maximum discard size in bytes")


class _Suspended:
    """A request that waits to be resumed."""

    __slots__ = ("tag",)

    def __init__(self, tag: str) -> None:
        self.tag = tag


class BlkDebugNode(PassingFilter):
    """A filter over one child, "image".

    :meth:`breakpoint`, :meth:`resume` and the like are for other threads: a suspended request blocks the thread that made it. ``listener`` is
    called with ("suspended" or "resumed", tag) as that happens, and must not call back. Closing the node resumes whatever waits.
    """

    driver: ClassVar[str] = "blkdebug"
    options_class: ClassVar[type[NodeOptions]] = BlkDebugOptions
    child_name: ClassVar[str] = "image"
    options: BlkDebugOptions

    def __init__(self, options: BlkDebugOptions) -> None:
        super().__init__(options)
        self.listener: Callable[[str, str], None] | None = None
        self._engine = Engine()
        self._changed = threading.Condition(ranked_lock(RANK_LEAF, "blkdebug"))  # type: ignore[arg-type]
        self._suspended: list[_Suspended] = []  # newest first
        self._informed: list[BlockNode] = []  # parents whose event_sink we are
        self._take = self._unshare = 0
        self._lists: dict[str, Any] = {}  # rules as they were given, for the printed name

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> BlkDebugNode:
        assert isinstance(options, BlkDebugOptions)
        node = cls(options)
        opening.track(node)
        config = options.config
        if config and opening.implied and os.path.exists(config) and not os.path.isfile(config):
            # Opening a pipe waits for its other end, for ever perhaps.
            raise PolicyRefused("an image cannot have rules read from what is no regular file", path=config)
        node._read_lists(given)
        image = given.pop("image", None)
        if image is None:
            image = options.x_image
        if image is None:
            raise InvalidArgument('A block device must be specified for "image"')
        if isinstance(image, str):
            image = opening.describe(image)
        elif options.x_image is not None and isinstance(image, dict):
            image = {**opening.describe(options.x_image), **image}
        # A file below a filter is not looked at for a format, so it is asked for as PRIMARY.
        child = opening.child(node, "image", image, Role.PRIMARY)
        child.role = Role.FILTERED
        node._set_limits()
        bind(child)  # our alignment is what the child may now rely on
        node.event("none")
        return node

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        if not filename.startswith("blkdebug:"):
            return {"x-image": filename}
        config, colon, image = filename[len("blkdebug:") :].partition(":")
        if not colon:
            raise InvalidArgument("blkdebug requires both config file and image path")
        return {"config": config, "x-image": image} if config else {"x-image": image}

    def _read_lists(self, given: dict[str, Any]) -> None:
        for name in ("inject-error", "set-state"):
            if name in given:
                self._lists[name] = as_list(given[name], name)
        rules = read_file(self.options.config) if self.options.config else []
        rules += from_options(given)
        for rule in sorted(rules, key=lambda rule: not isinstance(rule, InjectError)):
            self._engine.add(rule)
        self._take = _permissions(given.pop("take-child-perms", None), "take-child-perms")
        self._unshare = _permissions(given.pop("unshare-child-perms", None), "unshare-child-perms")

    def refit(self) -> None:
        self._set_limits()
        bind(self.below)

    def _set_limits(self) -> None:
        options = self.options
        below = self.below.node
        if options.align and (options.align & (options.align - 1) or options.align >= _INT_MAX):
            raise InvalidArgument(f"Cannot meet constraints with align {options.align}")
        block = max(options.align, below.limits.request_alignment)
        for name, value, unit in (
            ("max-transfer", options.max_transfer, block),
            ("opt-write-zero", options.opt_write_zero, block),
            ("max-write-zero", options.max_write_zero, max(options.opt_write_zero, block)),
            ("opt-discard", options.opt_discard, block),
            ("max-discard", options.max_discard, max(options.opt_discard, block)),
        ):
            if value % unit or not 0 <= value < _INT_MAX:
                raise InvalidArgument(f"Cannot meet constraints with {name} {value}")
        align = options.align or 1
        largest = options.max_transfer or below.limits.maximum_io
        self.limits = Limits(
            request_alignment=align,
            preferred_io=min(below.limits.preferred_io, largest),
            maximum_io=largest,
            zero_alignment=max(options.opt_write_zero, align),
            discard_alignment=max(options.opt_discard, align),
        )
        self.writable = self.writable and below.writable
        self.capabilities = below.capabilities._replace(writable=self.writable)

    # -- graph

    @property
    def filename(self) -> str:
        image = self.children.get("image")
        below = image.node.filename if image is not None else ""
        if not self._lists and not below.startswith("json:") and not self.strong_options().keys() - {"config"}:
            return f"blkdebug:{self.options.config or ''}:{below}"
        return json_name(self, flatten(self._lists))

    def strong_options(self) -> dict[str, Any]:
        return {name: value for name, value in super().strong_options().items() if name != "x-image"}

    def allocated_size(self) -> int | None:
        return None  # as in QEMU: a filter that opens its own file does not tell

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        return perm | self._take, shared & ~self._unshare

    def update_permissions(self, perm: int, shared: int) -> None:
        # Called whenever a user comes or goes: the formats and filters directly above tell us their events from now on.
        users = [
            edge.parent
            for edge in self.parents
            if isinstance(edge, Child) and edge.role in (Role.PRIMARY, Role.FILTERED)
        ]
        self._forget([parent for parent in self._informed if parent not in users])
        for parent in users:
            parent.event_sink = self.event
        self._informed = users

    def _forget(self, parents: list[BlockNode]) -> None:
        for parent in parents:
            if parent.event_sink == self.event:
                parent.event_sink = None

    def close(self) -> None:
        self._forget(self._informed)
        self._informed = []
        with self._changed:
            self._suspended.clear()
            self._changed.notify_all()

    # -- events and breakpoints

    def event(self, name: str) -> None:
        """Let the event *name* happen. Blocks while a breakpoint holds the calling thread."""
        mine: list[_Suspended] = []
        with self._changed:
            for tag in self._engine.happen(name):
                mine.append(_Suspended(tag))
                self._suspended.insert(0, mine[-1])
            if mine:
                self._changed.notify_all()
        if not mine:
            return
        for waiting in mine:
            self._tell("suspended", waiting.tag)
        with self._changed:
            while any(waiting in self._suspended for waiting in mine):
                self._changed.wait()

    def _tell(self, what: str, tag: str) -> None:
        if self.listener is not None:
            self.listener(what, tag)

    def breakpoint(self, event: str, tag: str) -> None:
        """Suspend the next request that causes *event*, once, under the name *tag*. Raises InvalidArgument for an unknown event."""
        if event not in EVENTS:
            raise _missing(f"blkdebug has no event '{event}'")
        with self._changed:
            self._engine.add(Suspend(event, tag))

    def remove_breakpoint(self, tag: str) -> None:
        """Remove the breakpoints of *tag* and resume all requests suspended by it. Raises InvalidArgument when there are neither."""
        with self._changed:
            found = self._engine.remove_suspend(tag)
            released = [waiting for waiting in self._suspended if waiting.tag == tag]
            self._release(released)
        if not found and not released:
            raise _missing(f"blkdebug has no breakpoint '{tag}'")

    def resume(self, tag: str) -> None:
        """Resume the request that was suspended last under *tag*. Raises InvalidArgument when there is none."""
        with self._changed:
            released = [waiting for waiting in self._suspended if waiting.tag == tag][:1]
            self._release(released)
        if not released:
            raise _missing(f"no request is suspended as '{tag}'")

    def _release(self, released: list[_Suspended]) -> None:
        for waiting in released:
            self._tell("resumed", waiting.tag)
            self._suspended.remove(waiting)
        self._changed.notify_all()

    def is_suspended(self, tag: str) -> bool:
        """Tell whether a request is suspended under *tag*."""
        with self._changed:
            return any(waiting.tag == tag for waiting in self._suspended)

    def wait_suspended(self, tag: str, timeout: float | None = None) -> bool:
        """Wait until a request is suspended under *tag*, at most *timeout* seconds; tell whether one is."""
        with self._changed:
            return self._changed.wait_for(lambda: any(waiting.tag == tag for waiting in self._suspended), timeout)

    @property
    def state(self) -> int:
        """The state that rules have brought the engine to."""
        return self._engine.state

    # -- requests

    def _check(self, io_type: str, offset: int, length: int) -> None:
        with self._changed:
            number, place = self._engine.error_of(io_type, offset, length)
        if number:
            error = from_os_error(OSError(number, os.strerror(number)), self.filename, doing=f"injected: {io_type}")
            error.offset = place
            raise error

    def read_into(self, offset: int, buffer: Buffer) -> None:
        limit = self.options.max_transfer or len(buffer)
        if len(buffer) <= limit:
            self._check("read", offset, len(buffer))
            self.below.read_into(offset, buffer)
            return
        view = memoryview(buffer)
        for start, count in _pieces(0, len(view), limit):
            self._check("read", offset + start, count)
            self.below.read_into(offset + start, view[start : start + count])

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        self.event("pwritev")
        try:
            self._write(offset, buffers, fua)
        finally:
            self.event("pwritev_done")

    def _write(self, offset: int, buffers: Sequence[Buffer], fua: bool) -> None:
        length = sum(map(len, buffers))
        limit = self.options.max_transfer
        if not limit or length <= limit:
            self._check("write", offset, length)
            self.below.write(offset, buffers, fua)
            return
        data = memoryview(b"".join(buffers))
        for start, count in _pieces(0, length, limit):
            self._check("write", offset + start, count)
            self.below.write(offset + start, (data[start : start + count],), fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.event("pwritev_zero")
        try:
            unit = self.limits.zero_alignment
            for start, count in _pieces(offset, length, self.options.max_write_zero, unit):
                if count % unit or self.below.node.capabilities.zeroes is Zeroing.NONE:
                    if not fallback:
                        raise NotSupported(f"blkdebug writes zeroes in units of {unit} bytes only", offset=start)
                    for begin, part in _pieces(start, count, ZEROES_SIZE):
                        self._write(begin, (ZEROES[:part],), fua)
                else:
                    self._check("write-zeroes", start, count)
                    self.below.write_zeroes(start, count, unmap=unmap, fallback=fallback, fua=fua)
        finally:
            self.event("pwritev_done")

    def discard(self, offset: int, length: int) -> None:
        block = self.limits.request_alignment
        for start, count in _pieces(offset, length, self.options.max_discard, self.limits.discard_alignment):
            # Odd pieces go down as they are, but for what is no whole block: that is left alone.
            begin, end = -(-start // block) * block, (start + count) // block * block
            if begin < end:
                self._check("discard", begin, end - begin)
                self.below.discard(begin, end - begin)

    def flush(self) -> None:
        self._check("flush", 0, 0)
        self.below.flush()

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        self._check("block-status", offset, length)
        return self.below.node.map_batch(offset, length)


def find(node: BlockNode) -> BlkDebugNode | None:
    """Return the blkdebug node that serves *node*: itself, or the first one on the way down through primary children."""
    while not isinstance(node, BlkDebugNode):
        primary = node.primary
        if primary is None:
            return None
        node = primary.node
    return node


def _permissions(value: Any, name: str) -> int:
    mask = 0
    for entry in as_list(value, name):
        if entry not in _PERMISSIONS:
            raise InvalidArgument(
                f"'{name}' does not accept '{entry}'",
                qemu=f"Parameter '{name}' does not accept value '{entry}'",
                hint="One of: " + ", ".join(_PERMISSIONS),
            )
        mask |= _PERMISSIONS[entry]
    return mask


def _missing(text: str) -> InvalidArgument:
    return InvalidArgument(text, errno=errno.ENOENT)


def _pieces(offset: int, length: int, limit: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ``[offset, offset + length)`` cut at multiples of *unit* (an odd head, whole units, an odd tail), at most *limit* bytes each."""
    end = offset + length
    head = min(length, -offset % unit)
    if head:
        yield offset, head
        offset += head
    middle = (end - offset) // unit * unit
    limit = limit or middle
    while middle:
        count = min(middle, limit)
        yield offset, count
        offset += count
        middle -= count
    if offset < end:
        yield offset, end - offset

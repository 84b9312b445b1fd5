"""An export: a disk as clients of an NBD server see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.block.node.node import walk
from cowhand.core.errors import InvalidArgument
from cowhand.exports.nbd.contexts import Context, contexts_of
from cowhand.nbd.constants import (
    FLAG_CAN_MULTI_CONN,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    MAX_STRING,
)
from cowhand.nbd.offers import Offer

if TYPE_CHECKING:
    from cowhand.block.disk import Disk


class NbdExport:
    """A disk under a name. Its size is that of the disk when it is made.

    *writable* lets clients change the disk, which must be open for writing then. *bitmaps* are names of dirty bitmaps that clients may ask
    for. *multi_conn* tells clients that several connections see one another's flushes, which is always so here.
    Raises InvalidArgument, BitmapNotFound, BitmapUnusable.
    """

    def __init__(
        self,
        disk: Disk,
        name: str = "",
        *,
        description: str = "",
        writable: bool = False,
        allocation_depth: bool = False,
        bitmaps: Sequence[str] = (),
        multi_conn: bool = True,
    ) -> None:
        for text, what in ((name, "name"), (description, "description")):
            if len(text.encode("utf-8", "surrogateescape")) > MAX_STRING:
                raise InvalidArgument(
                    f"an export's {what} has at most {MAX_STRING} bytes", qemu=f"export {what} '{text}' too long"
                )
        if writable and disk.read_only:
            raise InvalidArgument("a disk that is open for reading only cannot be exported for writing")
        self.disk = disk
        self.name = name
        self.writable = writable
        self.contexts: dict[str, Context] = contexts_of(disk, allocation_depth=allocation_depth, bitmaps=tuple(bitmaps))
        flags = FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_CACHE
        if writable:
            flags |= FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO
        else:
            flags |= FLAG_READ_ONLY
        if multi_conn:
            flags |= FLAG_CAN_MULTI_CONN
        self.offer = Offer(name, disk.size, flags, description, contexts=tuple(self.contexts))

    @property
    def waits(self) -> bool:
        """Whether requests may wait for another machine, for a limit or for a user: then several are done at once."""
        return any(node.delays or not (node.children or node.immediate) for node in walk((self.disk.root,)))


class Exports:
    """The exports of a server, by name; a :class:`cowhand.nbd.offers.Catalogue`. Thread-safe: replaced, never changed.

    With *default* the empty name means the only export there is.
    """

    def __init__(self, exports: Iterable[NbdExport] = (), *, default: bool = True) -> None:
        self._default = default
        self._exports: dict[str, NbdExport] = {}
        for export in exports:
            self.add(export)

    def add(self, export: NbdExport) -> None:
        """Offer *export* to clients that come from now on. Raises InvalidArgument where its name is taken."""
        if export.name in self._exports:
            raise InvalidArgument(f"there is an export '{export.name}' already")
        self._exports = {**self._exports, export.name: export}

    def remove(self, name: str) -> None:
        """Offer the export *name* no longer; clients that have it keep it."""
        self._exports = {known: export for known, export in self._exports.items() if known != name}

    def __iter__(self) -> Iterator[NbdExport]:
        return iter(self._exports.values())

    def get(self, name: str) -> NbdExport | None:
        """Return the export *name*."""
        exports = self._exports
        found = exports.get(name)
        if found is None and not name and self._default and len(exports) == 1:
            found = next(iter(exports.values()))
        return found

    def names(self) -> Sequence[tuple[str, str]]:
        return [(export.name, export.offer.description) for export in self._exports.values()]

    def find(self, name: str) -> Offer | None:
        export = self.get(name)
        return export.offer if export is not None else None

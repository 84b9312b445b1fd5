"""What a qcow2 node writes besides guest data: tables and header fields, guarded against overlaps, and the marks in the header.

Source: QEMU ``docs/interop/qcow2``, "Header" (incompatible and autoclear features).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.formats.qcow2.metadata.cluster_sets import MetadataMap
from cowhand.block.formats.qcow2.metadata.options import Qcow2Options
from cowhand.block.formats.qcow2.metadata.writeback import WriteBack
from cowhand.block.formats.qcow2.ondisk import header as headers, layout as L
from cowhand.block.node.node import Child
from cowhand.core import diagnostics
from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError, ImageCorrupt, Poisoned
from cowhand.core.locks import RANK_OPERATION, ranked_lock

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.refcount.allocator import Allocator


class MetadataNode(FormatNode):
    """The part of a qcow2 node that writes metadata; see :class:`cowhand.block.formats.qcow2.driver.Qcow2Node`."""

    options: Qcow2Options
    header: headers.Header
    file: Child
    data_child: Child
    allocator: Allocator
    write_back: WriteBack

    def __init__(self, options: Qcow2Options) -> None:
        super().__init__(options)
        self.metadata = MetadataMap()
        self.metadata_clusters: Container[int] = self.metadata.clusters
        self.unprotected = False  #: protection was asked for that cannot be given: nothing is written
        self.exclusive_held = False
        #: Reference counts are written when the image is closed; until then the dirty bit says that they are not to be relied on.
        self.lazy = False
        #: Counts and COPIED bits of many clusters are on their way to the disk, and its dirty bit says so.
        self.counts_distrusted = False
        self.operation = ranked_lock(RANK_OPERATION, "qcow2 operation")
        self.corrupt_reported = False
        self.external = False  #: guest data lies in a data file
        #: What tables name and the file does not have reads as zeroes, as in QEMU: for the drop-in tools, and for checks, which tell of it.
        self.cut_reads_as_zeroes = False
        self.like_qemu = False  #: damage is met, and told of, where QEMU meets it, as far as nothing is lost by that
        self.data_missing = False  #: which was not opened, since only the header is of interest

    # -- metadata I/O

    def write_metadata(self, offset: int, data: Buffer, *, in_flush: bool = False) -> None:
        """Write metadata at host *offset*; *in_flush*: by a write-back, which flushes it itself. Nothing is written once the node is poisoned."""
        if self.poison is not None:
            raise Poisoned(
                f"'{self.filename}' failed before: {self.poison.message}", path=self.filename, errno=self.poison.errno
            )
        if self.unprotected:
            self.refuse_unprotected()
        if not in_flush:
            self.changed = True
        # Also when it is given up later: what a failed operation left there is not fresh.
        self.allocator.high_water = max(self.allocator.high_water, offset + len(data))
        self.file.write(offset, (data,))

    def flush_file(self) -> None:
        """Make everything stable that was written to the file."""
        self.file.flush()

    def flush_all(self) -> None:
        """The same, and guest data that lies in a file of its own."""
        if self.external and not self.data_missing:
            self.data_child.flush()
        self.flush_file()

    @contextmanager
    def publishing(self, offset: int, before: bytes) -> Iterator[None]:
        """Switch to a new table in the ``with`` block: the field at *offset*, which held *before*, is written and made stable.

        After an error nobody knows whether the file names the old table or the new one. So the old value is written again; if that fails
        too, neither table may be taken for something else, and the node is poisoned.
        """
        try:
            yield
        except CowhandError as error:
            try:
                self.file.write(offset, (before,))
                self.file.flush()
            except CowhandError:
                self.set_poison(error)
            raise
        except BaseException as error:
            self.set_poison(error)
            raise

    def switch(self, offset: int, before: bytes, after: bytes) -> None:
        """Write *after* over *before* at host *offset*: what says which tables hold, inside one sector. It is stable when this returns.

        A lock that excludes other writers of the place is held. Raises what writing raises; then *before* stands there, or the node is poisoned.
        """
        with self.publishing(offset, before):
            self.write_metadata(offset, after)
            self.flush_file()

    def switch_header(self, **fields: int) -> None:
        """Give *fields* of the header, by their names in :class:`Header`, new values together: in the file as :meth:`switch` does, then in memory."""
        wanted = copy.copy(self.header)
        wanted.assign(fields)
        at, before = self.header.encode_fields(fields)
        self.switch(at, before, wanted.encode_fields(fields)[1])
        self.header.assign(fields)

    @contextmanager
    def rewriting_header(self) -> Iterator[headers.Header]:
        """Change the header in the ``with`` block; at its end it is written anew, whole. For what switches no table: names, extensions, features.

        Takes the write-back and the allocation lock. Raises InvalidArgument when there is no room, and what writing raises; after an error, also of
        the block, the old header stands, in the file and in memory.
        """
        with self.exclusive():
            header = self.header
            old = {name: getattr(header, name) for name in header.__slots__}
            old["extensions"] = list(header.extensions)
            try:
                yield header
                self.lay_out_header(header.encode())
            except BaseException:
                header.assign(old)
                raise

    def lay_out_header(self, after: bytes) -> None:
        """Make *after*, a whole cluster, the header, stably. The locks are held. Raises what writing raises, as :meth:`switch` does."""
        from cowhand.block.formats.qcow2.ondisk.header_stages import stages

        before = bytearray(len(after))
        self.file.read_into(0, before)
        with self.publishing(0, bytes(before)):
            for stage in stages(bytes(before), after):
                for offset, data in stage:
                    self.write_metadata(offset, data)
                self.flush_file()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the write-back and the allocation lock: for what writes metadata at once (table growth, snapshots).

        What leaves the block by another way than an error of ours poisons the node: memory and file may differ by more than a write-back mends.
        """
        with self.write_back.lock, self.lock:
            self.exclusive_held = True
            try:
                yield
            except CowhandError:
                raise
            except BaseException as error:
                self.set_poison(error)
                raise
            finally:
                self.exclusive_held = False

    # -- overlaps

    @abstractmethod
    def refuse_unprotected(self) -> None:
        """Raise why nothing can be written: protection that was asked for cannot be given."""

    def overlapping(self, name: str, offset: int) -> CowhandError:
        """Return the error of a write to host *offset* that would have hit the metadata *name*; the image is marked corrupt."""
        return self.mark_corrupt(
            f"Preventing invalid write on metadata (overlaps with {name})", offset=offset, fatal=True
        )

    def mark_corrupt(self, message: str, *, offset: int, fatal: bool = True) -> CowhandError:
        """Return the error for damage that was just found; on the first fatal one the image is marked corrupt and not written any more."""
        error = ImageCorrupt(
            message, qemu="Input/output error", path=self.filename, offset=offset, hint="Run check on the image."
        )
        if self.corrupt_reported and not (fatal and self.writable and self.poison is None):
            return error
        if not self.writable or not fatal:
            if not self.corrupt_reported:
                diagnostics.report(
                    f"qcow2: Image is corrupt: {message}; further non-fatal corruption events will be suppressed"
                )
        else:
            diagnostics.report(
                f"qcow2: Marking image as corrupt: {message}; further corruption events will be suppressed"
            )
        self.corrupt_reported = True
        if fatal and self.writable and self.poison is None:
            self.set_corrupt_mark()
            self.set_poison(ImageCorrupt(message, qemu="No medium found", path=self.filename, errno=123))
        return error

    # -- marks in the header

    def set_incompatible(self, bits: int) -> None:
        """Make *bits* the incompatible features, stably; a lock that excludes other writers of the header is held."""
        self.switch(L.OFFSET_INCOMPATIBLE, L.U64.pack(self.header.incompatible), L.U64.pack(bits))
        self.header.incompatible = bits

    def distrust_counts(self) -> None:
        """Say on disk that counts and COPIED bits are not to be relied on, before many are changed; the write-back lock is held.

        The bit demands a repair of who finds it after a crash. Version 2 has none; what a crash leaves there is harmless, and a check
        calls it wrong until it is repaired. The next write-back that ends well takes the bit away.
        """
        if not self.lazy and self.header.version >= 3:
            self.counts_distrusted = True
            self.set_incompatible(self.header.incompatible | L.INCOMPAT_DIRTY)

    def trust_counts(self) -> None:
        """End :meth:`distrust_counts`: all is stable. The write-back lock is held."""
        if self.counts_distrusted:
            self.set_incompatible(self.header.incompatible & ~L.INCOMPAT_DIRTY)
            self.counts_distrusted = False

    def set_corrupt_mark(self) -> None:
        """Mark the image corrupt on disk, as far as its version can say so."""
        if self.header.version < 3:
            return
        self.header.incompatible |= L.INCOMPAT_CORRUPT
        try:
            self.file.write(L.OFFSET_INCOMPATIBLE, (L.U64.pack(self.header.incompatible),))
            self.file.flush()
        except CowhandError as error:
            diagnostics.report(f"qcow2: the corrupt mark could not be written: {error.qemu()}")

    def set_autoclear(self, bits: int) -> None:
        """Make *bits* the autoclear features, stably; a lock that excludes other writers of the header is held."""
        self.header.autoclear = bits
        self.write_metadata(L.OFFSET_AUTOCLEAR, L.U64.pack(bits))
        self.flush_file()

    def clear_unknown_marks(self) -> None:
        """Take away autoclear bits that are not known: what they vouch for is not kept up here."""
        known = L.AUTOCLEAR_BITMAPS | L.AUTOCLEAR_RAW_DATA
        if self.header.autoclear & ~known and self.header.version >= 3:
            self.set_autoclear(self.header.autoclear & known)

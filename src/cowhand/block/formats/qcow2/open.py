"""Opening a qcow2 image: header, tables, snapshots, bitmaps, then data file, encryption and backing file (QEMU ``docs/interop/qcow2``).

Two ways in: :func:`open_image` makes a node with everything below it, as the user's options say; :func:`load` reads what the image's own file tells,
for who has connected the node to that file already. Both leave a node half filled where they raise; it is closed like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.block.format_io.mapped import RECORDED
from cowhand.block.formats.qcow2.cluster.mapping import Mapping
from cowhand.block.formats.qcow2.metadata.options import check_options
from cowhand.block.formats.qcow2.metadata.writeback import WriteBack
from cowhand.block.formats.qcow2.ondisk import header as headers, layout as L
from cowhand.block.formats.qcow2.refcount.allocator import Allocator
from cowhand.block.formats.qcow2.refcount.refcounts import Refcounts
from cowhand.block.node.node import Capabilities, Child, Limits, Role, Zeroing
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, ImageCorrupt, InvalidFormat, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.opening.opening import Opening

#: Host bytes that subclusters divide a cluster into, as a shift.
_SUBCLUSTER_SHIFT = 5

_SECTOR = 512  #: QEMU's disks are made of whole ones


def open_image(node: Qcow2Node, opening: Opening, given: dict[str, Any]) -> None:
    """Connect *node*, which is new, to the files that *given* or the image itself names, and load it; what *given* names is taken out of it.

    Raises InvalidArgument for options that do not fit the image, and what :func:`load` and the opening of other files raise.
    """
    file = given.pop("file", None)
    if file is None:
        raise InvalidFormat("a qcow2 image needs a 'file'", qemu='A block device must be specified for "file"')
    backing, encrypt = given.pop("backing", RECORDED), given.pop("encrypt", None)
    opening.track(node)
    node.file = opening.child(node, "file", file, Role.PRIMARY)
    node.data_child = node.file
    node.like_qemu = opening.policy.as_qemu or opening.like_qemu
    load(node, for_repair=opening.for_repair, as_qemu=opening.policy.as_qemu)
    if node.external or "data-file" in given or node.header.autoclear & L.AUTOCLEAR_RAW_DATA:
        from cowhand.block.formats.qcow2.cluster.data_file import attach

        attach(node, opening, given)
        node.mapping.restart_at_end()
    if node.header.crypt_method or encrypt is not None:
        from cowhand.block.formats.qcow2.cluster import encryption

        node.be_encrypted(encryption.configure(node, encrypt, unlocked=opening.unlocks))
    node.open_backing(opening, backing)


def load(node: Qcow2Node, *, for_repair: bool = False, as_qemu: bool = False) -> None:
    """Read the header of *node*'s file and the tables that are kept whole; an image that was not closed is repaired if it may be written.

    *for_repair* lets pass what a check reports and a repair mends; *as_qemu* refuses broken bitmaps as QEMU does, and leaves off
    what the disk has behind its last whole sector. Nothing else uses the node yet.
    Raises InvalidFormat, UnsupportedFeature, ImageCorrupt, IOFailed.
    """
    node.cut_reads_as_zeroes = as_qemu or for_repair
    # Who only reads needs no reference counts, and they may be all that is damaged.
    reading = not (node.writable or as_qemu or for_repair)
    header = node.header = _read_header(node.file, node.filename, for_repair=for_repair, reading=reading)
    if as_qemu and header.find(L.EXT_BITMAPS) is None:  # which are of the disk's true size
        header.size -= header.size % _SECTOR
    refuse_unsupported(header, node.filename, writable=node.writable, for_repair=for_repair)
    if not header.refcount_table_clusters and not for_repair:
        none = InvalidFormat(
            "Image does not contain a reference count table", path=node.filename, offset=L.OFFSET_REFCOUNT_TABLE + 8
        )
        if not reading:
            raise none
        header.counts_problem = header.counts_problem or none
    _set_units(node)
    _load_tables(node)
    from cowhand.block.formats.qcow2.snapshot.table import read_snapshots

    node.snapshots, node.snapshot_table_bytes = read_snapshots(node, for_repair=for_repair, reading=reading)
    from cowhand.block.formats.qcow2.bitmap.directory import load as load_bitmaps

    load_bitmaps(node, as_qemu=as_qemu and not for_repair)
    if header.incompatible & L.INCOMPAT_DIRTY and node.writable and not for_repair:
        repair_dirty(node)


def repair_dirty(node: Qcow2Node) -> None:
    """Put right the counts of an image that was not closed, before it is written; not where a part of it is missing. Raises ImageCorrupt."""
    from cowhand.block.formats.qcow2.check import repair
    from cowhand.block.formats.qcow2.references import require_whole

    if not node.cut_reads_as_zeroes:
        with node.lock:
            require_whole(node)
    repair.repair_dirty(node)


def _read_header(file: Child, path: str, *, for_repair: bool, reading: bool) -> headers.Header:
    # Behind the end of a file lie zeroes.
    first = bytearray(1 << L.CLUSTER_BITS_MIN)
    with memoryview(first) as view:
        file.read_into(0, view[: min(len(first), file.node.size)])
    bits = int.from_bytes(first[20:24], "big")
    if L.CLUSTER_BITS_MIN < bits <= L.CLUSTER_BITS_MAX and first[:4] == L.U32.pack(L.MAGIC):
        first = bytearray(min(1 << bits, file.node.size))
        file.read_into(0, first)
    return headers.parse(bytes(first), path, for_repair=for_repair, reading=reading)


def refuse_unsupported(header: headers.Header, path: str, *, writable: bool, for_repair: bool = False) -> None:
    """Raise where *header* tells of what cannot be read, or not be written while that is asked for (*writable*).

    Raises UnsupportedFeature, InvalidFormat, ImageCorrupt.
    """
    headers.check_features(header, path)
    if header.counts_problem is not None and writable:
        raise header.counts_problem
    if header.incompatible & L.INCOMPAT_EXTENDED_L2 and header.cluster_size < L.EXTENDED_CLUSTER_MIN:
        raise InvalidFormat(
            f"clusters of {header.cluster_size} bytes are too small for subclusters",
            qemu=f"unsupported subcluster size: {header.cluster_size >> _SUBCLUSTER_SHIFT}", path=path, offset=20,
        )  # fmt: skip
    if bool(header.incompatible & L.INCOMPAT_COMPRESSION) != (header.compression_type != L.COMPRESSION_DEFLATE):
        raise InvalidFormat(
            "the compression type and its incompatible feature bit contradict each other",
            qemu="qcow2: Compression type incompatible feature bit must "
            + ("not be set" if header.compression_type == L.COMPRESSION_DEFLATE else "be set"),
            path=path, offset=L.HEADER_V3_LENGTH,
        )  # fmt: skip
    if header.compression_type > L.COMPRESSION_ZSTD:
        raise UnsupportedFeature(
            f"qcow2: unknown compression type: {header.compression_type}", path=path, offset=L.HEADER_V3_LENGTH
        )
    if header.incompatible & L.INCOMPAT_CORRUPT and writable and not for_repair:
        raise ImageCorrupt(
            "the image is marked corrupt and is only opened for reading",
            qemu="qcow2: Image is corrupt; cannot be opened read/write", path=path, hint="Look at it with check, then repair it.", errno=13,
        )  # fmt: skip


def _set_units(node: Qcow2Node) -> None:
    header = node.header
    unit = node.cluster_size = node.allocation_unit = node.copy_unit = header.cluster_size
    node.external = bool(header.incompatible & L.INCOMPAT_DATA_FILE)
    node.extended = bool(header.incompatible & L.INCOMPAT_EXTENDED_L2)
    if node.extended:
        node.copy_unit = unit >> _SUBCLUSTER_SHIFT
    node.limits = Limits(preferred_io=max(1 << 20, unit), zero_alignment=node.copy_unit, discard_alignment=unit)
    node.capabilities = Capabilities(
        writable=node.writable, zeroes=Zeroing.NATIVE, discard=True, fua=True, resizable=True
    )


def _load_tables(node: Qcow2Node) -> None:
    header = node.header
    counts = _read_counts(node)
    node.refcounts = Refcounts(node, counts)
    node.mapping = _mapping_class(node)(node, _read_table(node.file, header.l1_offset, header.l1_size * L.ENTRY_SIZE))
    node.map = node.mapping.run  # type: ignore[method-assign]  # one call less on the way of every request
    check_options(node.options, header, header.entry_size)
    node.set_cache_limits()
    node.allocator = Allocator(node)
    node.write_back = WriteBack(node)


def _read_counts(node: Qcow2Node) -> bytearray:
    """Return the refcount table; an empty one where there is none that can be read, and that is let pass."""
    header = node.header
    if header.counts_problem is None:
        try:
            return _read_table(
                node.file, header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size
            )
        except CowhandError as error:
            if node.writable or node.cut_reads_as_zeroes:
                raise
            header.counts_problem = InvalidFormat(
                f"the reference counts cannot be read: {error.message}", qemu=error.qemu_message, path=error.path, offset=error.offset,
                errno=error.errno,
            )  # fmt: skip
    text = f"warning: '{node.filename}': {header.counts_problem.message}; it can be read all the same, but not written"
    diagnostics.report(text, as_tool=True)
    return bytearray()


def _mapping_class(node: Qcow2Node) -> type[Mapping]:
    if node.extended:
        from cowhand.block.formats.qcow2.cluster.extended_mapping import ExtendedMapping

        return ExtendedMapping
    if node.external:
        from cowhand.block.formats.qcow2.cluster.data_file import ExternalMapping

        return ExternalMapping
    return Mapping


def _read_table(file: Child, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    if length and offset < file.node.size:  # as QEMU reads it: beyond the end lie zeroes
        file.read_into(offset, data)
    return data

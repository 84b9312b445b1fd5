"""The qcow2 header and its extensions (QEMU ``docs/interop/qcow2``, "Header", "Header extensions").

Parsed with every field checked before it is used, and written so that what is not understood is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import InvalidArgument, InvalidFormat, UnsupportedFeature
from cowhand.core.units import MAX_SIZE

#: QEMU leaves the table of feature names out of headers this small, to have room for the backing file's name.
_SMALL_CLUSTER = 4096


class Extension(NamedTuple):
    """One header extension, in the order of the file."""

    kind: int
    data: bytes


#: Where the fields lie that are changed alone, or a few together: byte, length. The specification's "Header".
_FIELDS = {
    "size": (24, 8), "crypt_method": (32, 4), "l1_size": (36, 4), "l1_offset": (40, 8), "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4), "snapshot_count": (60, 4), "snapshots_offset": (64, 8), "incompatible": (72, 8),
    "compatible": (80, 8), "autoclear": (88, 8), "refcount_order": (96, 4),
}  # fmt: skip


class Header:
    """All fields of the header. Mutable; :meth:`encode` gives the bytes."""

    __slots__ = (
        "autoclear", "backing_format", "backing_name", "cluster_bits", "compatible", "compression_type",
        "counts_problem", "crypt_method", "extensions",
        "header_length", "incompatible", "l1_offset", "l1_size", "refcount_order", "refcount_table_clusters", "refcount_table_offset",
        "size", "snapshot_count", "snapshots_offset", "unknown_tail", "version",
    )  # fmt: skip

    def __init__(self) -> None:
        self.version = 3
        self.cluster_bits = 16
        self.size = 0
        self.crypt_method = L.CRYPT_NONE
        self.l1_size = 0
        self.l1_offset = 0
        self.refcount_table_offset = 0
        self.refcount_table_clusters = 0
        self.snapshot_count = 0
        self.snapshots_offset = 0
        self.incompatible = 0
        self.compatible = 0
        self.autoclear = 0
        self.refcount_order = 4
        self.header_length = L.HEADER_LENGTH_WRITTEN
        self.compression_type = L.COMPRESSION_DEFLATE
        self.unknown_tail = b""
        self.extensions: list[Extension] = []
        self.backing_name: str | None = None
        self.backing_format: str | None = None
        self.counts_problem: InvalidFormat | None = None  #: why nothing can be counted, where that was let pass

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 2 * L.ENTRY_SIZE if self.incompatible & L.INCOMPAT_EXTENDED_L2 else L.ENTRY_SIZE

    def assign(self, fields: Mapping[str, Any]) -> None:
        """Give *fields* the values that they are mapped to."""
        for name, value in fields.items():
            setattr(self, name, value)

    def find(self, kind: int) -> bytes | None:
        """Return the data of the first extension of *kind*, or None."""
        for extension in self.extensions:
            if extension.kind == kind:
                return extension.data
        return None

    def set(self, kind: int, data: bytes | None) -> None:
        """Replace the extension of *kind*, add it, or take it away (None); the others keep their places."""
        if data is None:
            self.extensions = [e for e in self.extensions if e.kind != kind]
        elif self.find(kind) is not None:
            self.extensions = [Extension(kind, data) if e.kind == kind else e for e in self.extensions]
        else:
            self.extensions.append(Extension(kind, data))

    def encode(self) -> bytes:
        """Return the header, its extensions and the backing file's name, padded to a cluster. Raises InvalidArgument when they do not fit."""
        name = (self.backing_name or "").encode("utf-8", "surrogateescape")
        if len(name) > L.MAX_BACKING_NAME:
            raise InvalidArgument(
                f"the backing file's name is longer than {L.MAX_BACKING_NAME} bytes", qemu="Backing file name too long"
            )
        body = self._encode_extensions()
        length = self.header_length if self.version >= 3 else L.HEADER_V2_LENGTH
        if length + len(body) + len(name) > self.cluster_size:
            raise InvalidArgument(
                f"header, extensions and backing file name need {length + len(body) + len(name)} bytes, more than a cluster",
                qemu="Header is too large for a cluster",
                hint="Use a larger cluster size or a shorter backing file name.",
            )
        fixed = self._fields(length + len(body) if name else 0, len(name))
        return (fixed + body + name).ljust(self.cluster_size, b"\0")

    def _fields(self, name_at: int = 0, name_length: int = 0) -> bytes:
        fixed = L.HEADER_V2.pack(
            L.MAGIC, self.version, name_at, name_length, self.cluster_bits, self.size, self.crypt_method, self.l1_size, self.l1_offset,
            self.refcount_table_offset, self.refcount_table_clusters, self.snapshot_count, self.snapshots_offset,
        )  # fmt: skip
        if self.version < 3:
            return fixed
        fixed += L.HEADER_V3_TAIL.pack(
            self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length
        )
        if self.header_length > L.HEADER_V3_LENGTH:
            fixed += bytes([self.compression_type]) + bytes(7)
        return fixed + self.unknown_tail

    def encode_fields(self, names: Iterable[str]) -> tuple[int, bytes]:
        """Return where the fields *names* begin in the header, and the bytes from the first to the last of them."""
        places = [_FIELDS[name] for name in names]
        begin, end = min(at for at, _ in places), max(at + length for at, length in places)
        return begin, self._fields()[begin:end]

    def _encode_extensions(self) -> bytes:
        # The order is QEMU's: backing format first, the feature names before whatever else there is.
        out = b""
        if self.backing_format is not None:
            out += _extension(L.EXT_BACKING_FORMAT, self.backing_format.encode())
        for kind in (L.EXT_DATA_FILE, L.EXT_CRYPTO):
            data = self.find(kind)
            if data is not None:
                out += _extension(kind, data)
        if self.version >= 3 and self.cluster_size > _SMALL_CLUSTER:
            names = b"".join(bytes([kind, bit]) + name.encode().ljust(46, b"\0") for kind, bit, name in L.FEATURE_NAMES)
            out += _extension(L.EXT_FEATURE_NAMES, names)
        bitmaps = self.find(L.EXT_BITMAPS)
        if bitmaps is not None:
            out += _extension(L.EXT_BITMAPS, bitmaps)
        known = (L.EXT_DATA_FILE, L.EXT_CRYPTO, L.EXT_FEATURE_NAMES, L.EXT_BITMAPS, L.EXT_BACKING_FORMAT)
        for extension in self.extensions:
            if extension.kind not in known:
                out += _extension(extension.kind, extension.data)
        return out + _extension(L.EXT_END, b"")


def _extension(kind: int, data: bytes) -> bytes:
    return L.U32.pack(kind) + L.U32.pack(len(data)) + data + bytes(-len(data) % 8)


def parse(data: bytes, path: str, *, for_repair: bool = False, reading: bool = False) -> Header:
    """Parse the first cluster of a file (*data*: at least its first 112 bytes, better all of it).

    Raises InvalidFormat or UnsupportedFeature naming *path*, the offset, what was found and what is allowed. *for_repair* lets a wrong snapshot
    table pass, which a check reports; *reading* reference counts that cannot be, which only changes need: ``counts_problem`` says why.
    """
    if len(data) < L.HEADER_V2_LENGTH:
        raise InvalidFormat(
            f"the file ends after {len(data)} bytes, inside the qcow2 header",
            qemu="Could not read qcow2 header",
            path=path,
        )
    header = Header()
    (
        magic, header.version, backing_offset, backing_length, header.cluster_bits, header.size, header.crypt_method, header.l1_size,
        header.l1_offset, header.refcount_table_offset, header.refcount_table_clusters, header.snapshot_count, header.snapshots_offset,
    ) = L.HEADER_V2.unpack_from(data)  # fmt: skip
    if magic != L.MAGIC:
        raise InvalidFormat(
            "this is not a qcow2 image: the magic bytes are missing",
            qemu="Image is not in qcow2 format",
            path=path,
            offset=0,
        )
    if header.version not in (2, 3):
        text = f"Unsupported qcow2 version {header.version}"
        raise UnsupportedFeature(text, path=path, offset=4)
    if not L.CLUSTER_BITS_MIN <= header.cluster_bits <= L.CLUSTER_BITS_MAX:
        raise InvalidFormat(
            f"cluster size 2^{header.cluster_bits} is not between 512 bytes and 2 MiB",
            qemu=f"Unsupported cluster size: 2^{header.cluster_bits}", path=path, offset=20,
        )  # fmt: skip
    _parse_v3(header, data, path)
    _tolerate(_check_width, header, path, reading)
    if header.crypt_method not in (L.CRYPT_NONE, L.CRYPT_AES, L.CRYPT_LUKS):
        raise UnsupportedFeature(f"Unsupported encryption method {header.crypt_method}", path=path, offset=32)
    if header.size > MAX_SIZE:
        raise InvalidFormat(
            f"a disk of {header.size} bytes is not possible", qemu="Image is too big", path=path, offset=24
        )
    if backing_offset > header.cluster_size:
        raise InvalidFormat(
            f"the backing file's name at {backing_offset:#x} lies outside of the header",
            qemu="Invalid backing file offset", path=path, offset=8,
        )  # fmt: skip
    _parse_extensions(header, data, backing_offset, path)
    if backing_offset:
        _parse_backing(header, data, backing_offset, backing_length, path)
    _tolerate(_check_counts, header, path, reading)
    _check_tables(header, path, for_repair)
    return header


def _parse_v3(header: Header, data: bytes, path: str) -> None:
    if header.version == 2:
        header.header_length = L.HEADER_V2_LENGTH
        header.refcount_order = 4
        return
    if len(data) < L.HEADER_V3_LENGTH:
        raise InvalidFormat("the file ends inside the qcow2 header", qemu="Could not read qcow2 header", path=path)
    (header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length) = (
        L.HEADER_V3_TAIL.unpack_from(data, L.HEADER_V2_LENGTH)
    )
    if header.header_length < L.HEADER_V3_LENGTH:
        raise InvalidFormat(
            f"header length {header.header_length} is less than {L.HEADER_V3_LENGTH}",
            qemu="qcow2 header too short",
            path=path,
            offset=100,
        )
    if header.header_length > header.cluster_size:
        raise InvalidFormat(
            f"header length {header.header_length} is more than a cluster",
            qemu="qcow2 header exceeds cluster size",
            path=path,
            offset=100,
        )
    if header.header_length > len(data):
        raise InvalidFormat(
            "the file ends inside the qcow2 header", qemu="Could not read unknown header fields", path=path, offset=100
        )
    if header.header_length > L.HEADER_V3_LENGTH:
        header.compression_type = data[L.HEADER_V3_LENGTH]
        header.unknown_tail = bytes(data[L.HEADER_LENGTH_WRITTEN : header.header_length])
        if header.header_length < L.HEADER_LENGTH_WRITTEN:
            raise InvalidFormat(
                f"header length {header.header_length} ends inside a field",
                qemu="qcow2 header too short",
                path=path,
                offset=100,
            )


def check_features(header: Header, path: str) -> None:
    """Raise UnsupportedFeature naming every incompatible feature that is unknown."""
    known = sum(1 << bit for kind, bit, _ in L.FEATURE_NAMES if kind == 0)
    unknown = header.incompatible & ~known
    if not unknown:
        return
    table = header.find(L.EXT_FEATURE_NAMES) or b""
    names: dict[int, str] = {}
    # The last name may be cut off by the extension's end: what is missing are zeroes.
    for at in range(0, len(table) - 2, 48):
        if table[at] == 0:
            names[table[at + 1]] = table[at + 2 : at + 48].split(b"\0")[0].decode("ascii", "replace")
    listed = [
        names.get(bit, f"Unknown incompatible feature: {1 << bit:x}")
        for bit in range(64)
        if unknown & (1 << bit) and bit in names
    ]
    rest = sum(1 << bit for bit in range(64) if unknown & (1 << bit) and bit not in names)
    if rest:
        listed.append(f"Unknown incompatible feature: {rest:x}")
    raise UnsupportedFeature(
        "Unsupported qcow2 feature(s): " + ", ".join(listed), path=path, offset=L.OFFSET_INCOMPATIBLE
    )


def _parse_extensions(header: Header, data: bytes, backing_offset: int, path: str) -> None:
    """Read extensions up to the end mark, the backing file's name or the end of the first cluster."""
    end = min(len(data), backing_offset or header.cluster_size, header.cluster_size)
    at = header.header_length
    while at < end:
        # The last one's own head may reach past the end: then its length is too large, whatever it is.
        kind, length = (L.U32.unpack_from(data[at : at + 8].ljust(8, b"\0"), position)[0] for position in (0, 4))
        at += 8
        if kind == L.EXT_END:
            return
        if length > end - at:
            raise InvalidFormat(
                f"header extension {kind:#010x} of {length} bytes is longer than the {max(0, end - at)} bytes left for it",
                qemu="Header extension too large", path=path, offset=at - 8,
            )  # fmt: skip
        content = bytes(data[at : at + length])
        if kind == L.EXT_BACKING_FORMAT:
            if length >= 16:
                raise InvalidFormat(
                    f"the backing format's name has {length} bytes, more than 15",
                    qemu=f"ERROR: ext_backing_format: len={length} too large (>=16)", path=path, offset=at,
                )  # fmt: skip
            # Others pad the name, or leave it empty where the format is to be found out.
            header.backing_format = content.split(b"\0")[0].decode("ascii", "replace") or None
        else:
            header.extensions.append(Extension(kind, content))
        at += length + -length % 8


def _parse_backing(header: Header, data: bytes, offset: int, length: int, path: str) -> None:
    if length > min(L.MAX_BACKING_NAME, header.cluster_size - offset):
        raise InvalidFormat(
            f"backing file name of {length} bytes is too long", qemu="Backing file name too long", path=path, offset=16
        )
    if offset + length > len(data):
        raise InvalidFormat(
            "the file ends inside the backing file's name",
            qemu="Could not read backing file name",
            path=path,
            offset=offset,
        )
    header.backing_name = bytes(data[offset : offset + length]).split(b"\0")[0].decode("utf-8", "surrogateescape")


def _check_table(
    offset: int, entries: int, entry_size: int, limit: int, cluster_size: int, what: str, at: int, path: str
) -> None:
    if entries * entry_size > limit:
        raise InvalidFormat(
            f"the {what} has {entries} entries, more than {limit // entry_size}",
            qemu=f"{what} too large",
            path=path,
            offset=at,
        )
    if offset % cluster_size or offset + entries * entry_size >= 1 << 63:
        raise InvalidFormat(
            f"the {what} cannot lie at {offset:#x}", qemu=f"{what} offset invalid", path=path, offset=at
        )


def _tolerate(check: Callable[[Header, str], None], header: Header, path: str, reading: bool) -> None:
    """Do *check*; where it is only read the first error is remembered instead of raised."""
    try:
        check(header, path)
    except InvalidFormat as error:
        if not reading:
            raise
        header.counts_problem = header.counts_problem or error


def _check_width(header: Header, path: str) -> None:
    order = header.refcount_order
    if order > L.MAX_REFCOUNT_ORDER:
        header.refcount_order = L.MAX_REFCOUNT_ORDER  # for who reads on
        raise InvalidFormat(
            f"reference counts of 2^{order} bits are wider than 64",
            qemu="Reference count entry width too large; may not exceed 64 bits", path=path, offset=96,
        )  # fmt: skip


def _check_counts(header: Header, path: str) -> None:
    cluster = header.cluster_size
    _check_table(
        header.refcount_table_offset, header.refcount_table_clusters, cluster, L.MAX_REFCOUNT_TABLE_BYTES, cluster,
        "Reference count table", L.OFFSET_REFCOUNT_TABLE, path,
    )  # fmt: skip


def _check_tables(header: Header, path: str, for_repair: bool) -> None:
    cluster = header.cluster_size
    if header.snapshot_count > L.MAX_SNAPSHOTS and not for_repair:
        raise InvalidFormat(
            f"{header.snapshot_count} snapshots are more than {L.MAX_SNAPSHOTS}", qemu="Snapshot table too large", path=path,
            offset=L.OFFSET_SNAPSHOTS,
        )  # fmt: skip
    if not for_repair:
        _check_table(
            header.snapshots_offset, header.snapshot_count, L.SNAPSHOT_HEADER.size, L.MAX_SNAPSHOT_TABLE_BYTES, cluster,
            "Snapshot table", L.OFFSET_SNAPSHOTS, path,
        )  # fmt: skip
    _check_table(
        header.l1_offset,
        header.l1_size,
        L.ENTRY_SIZE,
        L.MAX_L1_BYTES,
        cluster,
        "Active L1 table",
        L.OFFSET_L1_SIZE,
        path,
    )
    if header.size > cluster // header.entry_size * cluster * (L.MAX_L1_BYTES // L.ENTRY_SIZE):
        raise InvalidFormat(
            f"a disk of {header.size} bytes needs a larger L1 table than an image may have",
            qemu="Image is too big", path=path, offset=24,
        )  # fmt: skip
    needed = -(-header.size // (cluster * (cluster // header.entry_size)))
    if header.l1_size < needed:
        raise InvalidFormat(
            f"the L1 table has {header.l1_size} entries, and a disk of {header.size} bytes needs {needed}",
            qemu="L1 table is too small", path=path, offset=L.OFFSET_L1_SIZE,
        )  # fmt: skip

"""Constants and structures of qcow2 (QEMU ``docs/interop/qcow2``). No I/O.

"Specified" limits are the specification's; the others are QEMU's own, kept so that what one writes the other reads.
"""

from __future__ import annotations

import struct

MAGIC = 0x514649FB

# Header fields, big-endian ("Header" of the specification).
HEADER_V2 = struct.Struct(">IIQIIQIIQQIIQ")
HEADER_V3_TAIL = struct.Struct(">QQQII")
HEADER_V2_LENGTH = 72
HEADER_V3_LENGTH = 104
HEADER_LENGTH_WRITTEN = 112  #: with the compression type and padding, as QEMU writes it

# Offsets of fields that are switched alone.
OFFSET_L1_SIZE = 36  #: followed by the L1 table's offset: 12 bytes that change together
OFFSET_REFCOUNT_TABLE = 48  #: followed by its length in clusters: 12 bytes that change together
OFFSET_SNAPSHOTS = 60  #: number, then offset: 12 bytes that change together
OFFSET_INCOMPATIBLE = 72
OFFSET_AUTOCLEAR = 88

CLUSTER_BITS_MIN = 9  #: specified
EXTENDED_CLUSTER_MIN = 16384  #: QEMU: 32 subclusters of a sector each
CLUSTER_BITS_MAX = 21  #: QEMU: 2 MiB
MAX_REFCOUNT_ORDER = 6  #: specified
MAX_L1_BYTES = 32 << 20  #: QEMU
MAX_REFCOUNT_TABLE_BYTES = 8 << 20  #: QEMU
MAX_SNAPSHOTS = 65536  #: QEMU
MAX_SNAPSHOT_EXTRA = 1024  #: QEMU, bytes for each snapshot
MAX_SNAPSHOT_TABLE_BYTES = 1024 * MAX_SNAPSHOTS  #: QEMU
MAX_SNAPSHOT_TEXT_BYTES = (
    320 * MAX_SNAPSHOTS
)  #: ours, for ids and names together: QEMU makes ids of 10 bytes and names of 255
MAX_BITMAPS = 65535  #: QEMU
MAX_BACKING_NAME = 1023  #: specified
MAX_HOST_OFFSET = 1 << 56  #: specified: host offsets have 56 bits
MAX_FILE_OFFSET = (1 << 63) - 1  #: the system's: fields of 64 bits that name a place can say more

# Incompatible features (specified).
INCOMPAT_DIRTY = 1 << 0
INCOMPAT_CORRUPT = 1 << 1
INCOMPAT_DATA_FILE = 1 << 2
INCOMPAT_COMPRESSION = 1 << 3
INCOMPAT_EXTENDED_L2 = 1 << 4
COMPAT_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_DATA = 1 << 1

#: (type, bit, name) as QEMU writes the feature name table; type 0 incompatible, 1 compatible, 2 autoclear
FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)

# Header extensions.
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2
COMPRESSION_DEFLATE, COMPRESSION_ZSTD = 0, 1

# L1 and L2 entries (specified).
COPIED = 1 << 63
ENTRY_COMPRESSED = 1 << 62
ENTRY_ZERO = 1 << 0
L1_OFFSET_MASK = 0x00FFFFFFFFFFFE00
L2_OFFSET_MASK = 0x00FFFFFFFFFFFE00
L1_RESERVED_MASK = 0x7F000000000001FF
L2_RESERVED_MASK = 0x3F000000000001FE
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFFFFFFFFFFFE00
REFCOUNT_TABLE_RESERVED_MASK = 0x1FF

ENTRY_SIZE = 8
U64 = struct.Struct(">Q")
U32 = struct.Struct(">I")

#: Metadata is written in pages of this size, or of a cluster where that is smaller.
PAGE = 4096

# Bitmap directory ("Bitmaps extension" and "Bitmap directory").
BITMAP_EXTENSION = struct.Struct(">IIQQ")
BITMAP_DIRECTORY_ENTRY = struct.Struct(">QIIBBHI")
BITMAP_TABLE_OFFSET_MASK = 0x00FFFFFFFFFFFE00

# Snapshot table entries ("Snapshots").
SNAPSHOT_HEADER = struct.Struct(">QIHHIIQII")


def c_hex(value: int) -> str:
    """Return *value* as C's ``%#x`` prints it, in QEMU's messages: nothing before a zero."""
    return f"{value:#x}" if value else "0"


def compressed_location(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return (host byte offset, bytes from there to the end of its last 512-byte sector) of a compressed cluster's descriptor.

    "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8) bits of offset, the rest counts additional sectors.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = ((entry & (ENTRY_COMPRESSED - 1)) >> shift) + 1
    return offset, sectors * 512 - (offset & 511)


def compressed_limit(cluster_bits: int) -> int:
    """Return the host offset from which on no descriptor of compressed bytes can name a place: fewer bits are left with larger clusters."""
    return 1 << 62 - (cluster_bits - 8)


def compressed_entry(offset: int, nbytes: int, cluster_bits: int) -> int:
    """Return the descriptor of *nbytes* compressed bytes at host *offset*; the inverse of :func:`compressed_location`."""
    shift = 62 - (cluster_bits - 8)
    sectors = ((offset + nbytes - 1) >> 9) - (offset >> 9)
    return ENTRY_COMPRESSED | sectors << shift | offset

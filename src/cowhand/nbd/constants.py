"""Numbers of the NBD protocol, their names, and this implementation's limits.

Source: NetworkBlockDevice ``doc/proto.md`` ("Values", and the sections that its comments name); metadata contexts of QEMU:
``docs/interop/nbd.txt``.
"""

from __future__ import annotations

import errno

DEFAULT_PORT = 10809  #: registered with IANA

# -- handshake ("Protocol phases")

INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OLDSTYLE_MAGIC = bytes.fromhex("00420281861253")  #: behind a zero byte; the magic is eight bytes long
OPTION_REPLY_MAGIC = 0x0003E889045565A9

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11

OPTION_NAMES = {
    OPT_EXPORT_NAME: "export name",
    OPT_ABORT: "abort",
    OPT_LIST: "list",
    OPT_STARTTLS: "starttls",
    OPT_INFO: "info",
    OPT_GO: "go",
    OPT_STRUCTURED_REPLY: "structured reply",
    OPT_LIST_META_CONTEXT: "list meta context",
    OPT_SET_META_CONTEXT: "set meta context",
    OPT_EXTENDED_HEADERS: "extended headers",
}

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31  #: this bit says that a reply is an error
REP_ERR_UNSUP = REP_ERROR + 1
REP_ERR_POLICY = REP_ERROR + 2
REP_ERR_INVALID = REP_ERROR + 3
REP_ERR_PLATFORM = REP_ERROR + 4
REP_ERR_TLS_REQD = REP_ERROR + 5
REP_ERR_UNKNOWN = REP_ERROR + 6
REP_ERR_SHUTDOWN = REP_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD = REP_ERROR + 8
REP_ERR_TOO_BIG = REP_ERROR + 9
REP_ERR_EXT_HEADER_REQD = REP_ERROR + 10

REPLY_NAMES = {
    REP_ACK: "ack",
    REP_SERVER: "server",
    REP_INFO: "info",
    REP_META_CONTEXT: "meta context",
    REP_ERR_UNSUP: "unsupported",
    REP_ERR_POLICY: "denied by policy",
    REP_ERR_INVALID: "invalid",
    REP_ERR_PLATFORM: "platform lacks support",
    REP_ERR_TLS_REQD: "TLS required",
    REP_ERR_UNKNOWN: "export unknown",
    REP_ERR_SHUTDOWN: "server shutting down",
    REP_ERR_BLOCK_SIZE_REQD: "block size required",
    REP_ERR_TOO_BIG: "option payload too big",
    REP_ERR_EXT_HEADER_REQD: "extended headers required",
}

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

# -- transmission

FLAG_HAS_FLAGS = 1 << 0
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_ROTATIONAL = 1 << 4
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_WRITE_ZEROES = 1 << 6
FLAG_SEND_DF = 1 << 7
FLAG_CAN_MULTI_CONN = 1 << 8
FLAG_SEND_RESIZE = 1 << 9
FLAG_SEND_CACHE = 1 << 10
FLAG_SEND_FAST_ZERO = 1 << 11
FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

COMMAND_NAMES = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_DISC: "disconnect",
    CMD_FLUSH: "flush",
    CMD_TRIM: "discard",
    CMD_CACHE: "cache",
    CMD_WRITE_ZEROES: "write zeroes",
    CMD_BLOCK_STATUS: "block status",
}

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3
CMD_FLAG_FAST_ZERO = 1 << 4
CMD_FLAG_PAYLOAD_LEN = 1 << 5  #: of extended headers

REPLY_FLAG_DONE = 1 << 0
REPLY_TYPE_NONE = 0
REPLY_TYPE_OFFSET_DATA = 1
REPLY_TYPE_OFFSET_HOLE = 2
REPLY_TYPE_BLOCK_STATUS = 5
REPLY_TYPE_BLOCK_STATUS_EXT = 6
REPLY_TYPE_ERROR_BIT = 1 << 15
REPLY_TYPE_ERROR = REPLY_TYPE_ERROR_BIT + 1
REPLY_TYPE_ERROR_OFFSET = REPLY_TYPE_ERROR_BIT + 2

STATE_HOLE = 1 << 0  #: of base:allocation
STATE_ZERO = 1 << 1

CONTEXT_ALLOCATION = "base:allocation"
CONTEXT_QEMU_DEPTH = "qemu:allocation-depth"
CONTEXT_QEMU_BITMAP = "qemu:dirty-bitmap:"  #: before the bitmap's name

# -- errors on the wire; the protocol's numbers, which are Linux's

_ERRNO = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.EOPNOTSUPP,
    108: errno.ESHUTDOWN,
}


def errno_of(wire: int) -> int:
    """Return the system's number of an error on the wire; what the protocol does not know is EINVAL."""
    return _ERRNO.get(wire, errno.EINVAL)


_WIRE = {
    errno.EROFS: 1,
    errno.EACCES: 1,
    errno.EFBIG: 28,
    errno.EDQUOT: 28,
    errno.ENOTSUP: 95,
    **{number: wire for wire, number in _ERRNO.items()},
}


def wire_of(number: int) -> int:
    """Return the number on the wire of one of the system's errors; what the protocol does not know is EIO."""
    return _WIRE.get(number, 5)


# -- limits

#: Longest string, the protocol's.
MAX_STRING = 4096
#: Longest payload of a read or write that works without asking ("Size of payload"); also the most that is ever asked here.
MAX_PAYLOAD = 32 << 20
#: Longest reply to an option: two strings and some numbers. Ours.
MAX_OPTION_REPLY = 4 * MAX_STRING
#: Replies that one option may have (a list of exports, infos). Ours.
MAX_OPTION_REPLIES = 65536
#: Bytes of one block-status chunk: half a million extents. Ours; QEMU's server sends up to one MiB.
MAX_STATUS_PAYLOAD = 4 << 20
#: Chunks with errors that one reply may have. Ours.
MAX_ERROR_CHUNKS = 1024
#: Pieces out of order that a reply to a read may be in. Ours.
MAX_PIECES = 4096
#: Longest payload of an option that a server keeps: the name of an export and some dozen queries. Ours.
MAX_OPTION_PAYLOAD = 128 << 10
#: Longest one that it reads to its end, to say that it is too long. Ours.
MAX_SKIPPED_OPTION = 4 << 20
#: Options of one client. Ours; nbdkit's limit is the same.
MAX_OPTIONS = 1024
#: Metadata contexts that one client may choose. Ours.
MAX_CONTEXTS = 256
#: Longest error chunk: number, length, message, offset.
MAX_ERROR_PAYLOAD = 4 + 2 + MAX_STRING + 8


def option_name(option: int) -> str:
    """Name an option for a message."""
    return OPTION_NAMES.get(option, "<unknown>")


def reply_name(reply: int) -> str:
    """Name an option's reply for a message."""
    return REPLY_NAMES.get(reply, "<unknown>")

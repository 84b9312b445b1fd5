"""Making a new qcow2 image (QEMU ``docs/interop/qcow2``). Everything lies where ``qemu-img create`` puts it."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.header import Header
from cowhand.block.formats.qcow2.ondisk.refcount_entries import Counts
from cowhand.block.node.create_options import CreateOption
from cowhand.core.errors import InvalidArgument

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.amend.key_slots import EncryptionPlan
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.node.node import BlockNode, Child

#: In the order in which QEMU prints them.
CREATE_OPTIONS = (
    CreateOption(
        "encryption", "bool", help="Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"
    ),
    CreateOption("encrypt.format", "str", help="Encrypt the image, format choices: 'aes', 'luks'"),
    CreateOption("encrypt.key-secret", "str", help="ID of secret providing qcow AES key or LUKS passphrase"),
    CreateOption("encrypt.cipher-alg", "str", help="Name of encryption cipher algorithm"),
    CreateOption("encrypt.cipher-mode", "str", help="Name of encryption cipher mode"),
    CreateOption("encrypt.ivgen-alg", "str", help="Name of IV generator algorithm"),
    CreateOption("encrypt.ivgen-hash-alg", "str", help="Name of IV generator hash algorithm"),
    CreateOption("encrypt.hash-alg", "str", help="Name of encryption hash algorithm"),
    CreateOption("encrypt.iter-time", "int", help="Time to spend in PBKDF in milliseconds"),
    CreateOption("cluster_size", "size", "65536", help="qcow2 cluster size"),
    CreateOption("extended_l2", "bool", "off", help="Extended L2 tables"),
    CreateOption("preallocation", "str", help="Preallocation mode (allowed values: off, metadata, falloc, full)"),
    CreateOption("compression_type", "str", "zlib", help="Compression method used for image cluster compression"),
    CreateOption("size", "size", help="Virtual disk size"),
    CreateOption("compat", "str", help="Compatibility level (v2 [0.10] or v3 [1.1])"),
    CreateOption("backing_file", "str", help="File name of a base image"),
    CreateOption("backing_fmt", "str", help="Image format of the base image"),
    CreateOption("data_file", "str", help="File name of an external data file"),
    CreateOption("data_file_raw", "bool", help="The external data file must stay valid as a raw image"),
    CreateOption("keep_data_file", "bool"),  # of QEMU 11
    CreateOption("lazy_refcounts", "bool", "off", help="Postpone refcount updates"),
    CreateOption("refcount_bits", "int", "16", help="Width of a reference count entry in bits"),
)

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_PREALLOCATIONS = ("off", "metadata", "falloc", "full")
_COMPRESSIONS = {"zlib": L.COMPRESSION_DEFLATE, "zstd": L.COMPRESSION_ZSTD}


def _one_of(name: str, value: Any, known: Sequence[str], hint: str) -> None:
    if value not in known:
        raise InvalidArgument(f"Parameter '{name}' does not accept value '{value}'", hint=hint)


def _check_values(options: Mapping[str, Any]) -> None:
    """Refuse words that mean nothing: QEMU finds those first, whatever else is wrong."""
    _one_of("version", options.get("compat", "1.1"), tuple(_VERSIONS), "compat is 0.10 (v2) or 1.1 (v3).")
    if _encrypts(options):
        from cowhand.block.formats.qcow2.amend import key_slots

        key_slots.check_values(options)
    hint = "preallocation is off, metadata, falloc or full."
    _one_of("preallocation", _preallocation(options), _PREALLOCATIONS, hint)
    hint = "compression_type is zlib or zstd."
    _one_of("compression-type", options.get("compression_type", "zlib"), tuple(_COMPRESSIONS), hint)


def _encrypts(options: Mapping[str, Any]) -> bool:
    return any(value for name, value in options.items() if name.startswith("encrypt"))


def _preallocation(options: Mapping[str, Any]) -> str:
    given = options.get("preallocation")
    return "off" if given is None else given


def _plan_clusters(header: Header, options: Mapping[str, Any]) -> None:
    """Set the size of clusters, and what they are made of."""
    cluster = options.get("cluster_size", 65536)
    if not 1 << L.CLUSTER_BITS_MIN <= cluster <= 1 << L.CLUSTER_BITS_MAX or cluster & (cluster - 1):
        raise InvalidArgument("Cluster size must be a power of two between 512 and 2048k")
    header.cluster_bits = cluster.bit_length() - 1
    if options.get("extended_l2"):
        _needs_version_3(header, "Extended L2 entries are only supported with")
        if cluster < L.EXTENDED_CLUSTER_MIN:
            raise InvalidArgument(
                f"Extended L2 entries are only supported with cluster sizes of at least {L.EXTENDED_CLUSTER_MIN} bytes"
            )
        header.incompatible |= L.INCOMPAT_EXTENDED_L2


def _needs_version_3(header: Header, what: str, tail: str = "compatibility level 1.1 and above") -> None:
    if header.version < 3:
        raise InvalidArgument(f"{what} {tail} (use version=v3 or greater)")


def _plan_backing(header: Header, options: Mapping[str, Any]) -> None:
    header.backing_name = options.get("backing_file")
    header.backing_format = options.get("backing_fmt")
    preallocated = _preallocation(options) != "off"
    if header.backing_name is not None and preallocated and not header.incompatible & L.INCOMPAT_EXTENDED_L2:
        raise InvalidArgument("Backing file and preallocation can only be used at the same time if extended_l2 is on")
    if header.backing_format is not None and header.backing_name is None:
        raise InvalidArgument("Backing format cannot be used without backing file")


def _plan_header(size: int, options: Mapping[str, Any]) -> Header:
    """Return the header of a new image of *size* bytes, tables still missing. Raises InvalidArgument and NotSupported in QEMU's words and order."""
    header = Header()
    header.version = _VERSIONS[options.get("compat", "1.1")]
    _plan_clusters(header, options)
    _plan_backing(header, options)
    if options.get("lazy_refcounts"):
        _needs_version_3(header, "Lazy refcounts only supported with")
        header.compatible |= L.COMPAT_LAZY_REFCOUNTS
    bits = options.get("refcount_bits", 16)
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise InvalidArgument("Refcount width must be a power of two and may not exceed 64 bits")
    if bits != 16:
        _needs_version_3(header, "Different refcount widths than 16 bits require", "compatibility level 1.1 or above")
    header.refcount_order = bits.bit_length() - 1
    if options.get("data_file") or options.get("data_file_raw") or options.get("keep_data_file"):
        from cowhand.block.formats.qcow2.cluster.data_file import plan

        plan(header, options)
    header.compression_type = _COMPRESSIONS[options.get("compression_type", "zlib")]
    if header.compression_type:
        _needs_version_3(header, "Non-zlib compression type is only supported with")
        header.incompatible |= L.INCOMPAT_COMPRESSION
    header.size = size
    cluster = 1 << header.cluster_bits
    tables = -(-size // (cluster * (cluster // header.entry_size)))
    if tables * 8 > L.MAX_L1_BYTES:
        raise InvalidArgument(
            "the L1 table of so large an image would be larger than 32 MiB", qemu="The image size is too large (try using a larger cluster size)",
            hint="Use a larger cluster size.", errno=errno.EFBIG,
        )  # fmt: skip
    return header


def plan(size: int, options: Mapping[str, Any]) -> tuple[Header, EncryptionPlan | None, str]:
    """Return the header, how to encrypt, and the preallocation of a new image. Raises what creating it would, without a look at any file."""
    _check_values(options)
    header = _plan_header(size, options)
    encryption = None
    if _encrypts(options):
        from cowhand.block.formats.qcow2.amend import key_slots

        encryption = key_slots.plan(options)
    return header, encryption, _preallocation(options)


def create(file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
    """Make the open, writable protocol node *file* a qcow2 image of *size* bytes; *options* are CREATE_OPTIONS by name, converted."""
    header, encryption, preallocation = plan(size, options)
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.metadata.options import Qcow2Options
    from cowhand.block.graph import graph
    from cowhand.block.node.node import Role

    node = Qcow2Node(Qcow2Options(read_only=False))
    # The edge comes first: it takes the locks.
    node.file = node.data_child = graph.attach(node, "file", file, Role.PRIMARY)
    try:
        if header.incompatible & L.INCOMPAT_DATA_FILE:
            node.data_child = graph.attach(node, "data-file", options["data_file_node"], Role.DATA)
            if header.autoclear & L.AUTOCLEAR_RAW_DATA and preallocation == "off":
                preallocation = "metadata"  # every cluster is where a reader of the data file alone finds it
            if not options.get("keep_data_file") and node.data_child.node.capabilities.resizable:
                node.data_child.node.resize(0, shrink=True)
        make_empty(file)
        _write_empty(node.file, header)
        _grow(node, size, header, preallocation)
        if encryption is not None:
            from cowhand.block.formats.qcow2.amend import key_slots

            key_slots.make(node, encryption)
    finally:
        try:
            node.close()
        finally:
            node.closed = True
            for child in list(node.children.values()):
                graph.release(child)


def _write_empty(file: Child, header: Header) -> None:
    """Write header, refcount table and first refcount block of an image without a disk: three clusters."""
    cluster = header.cluster_size
    wanted = header.size, header.backing_name, header.backing_format
    header.size, header.backing_name, header.backing_format = 0, None, None
    header.refcount_table_offset = cluster
    header.refcount_table_clusters = 1
    block = bytearray(cluster)
    Counts(header.refcount_order).fill(block, 0, 3, 1)
    table = L.U64.pack(2 * cluster).ljust(cluster, b"\0")
    file.write(0, (header.encode(), table, block))
    file.flush()
    header.size, header.backing_name, header.backing_format = wanted


def _grow(node: Qcow2Node, size: int, header: Header, preallocation: str) -> None:
    from cowhand.block.formats.qcow2.open import load
    from cowhand.block.formats.qcow2.resize.grow import resize

    load(node)
    node.check_writable()
    resize(node, size, preallocation=preallocation)
    node.header.backing_name, node.header.backing_format = header.backing_name, header.backing_format
    with node.exclusive():
        node.write_metadata(0, node.header.encode())
    node.flush()

"""The luks format: a disk encrypted as LUKS version 1 says ("LUKS1 On-Disk Format Specification" 1.2.3), as QEMU and dm-crypt write it.

Behind the header and its key slots lies the disk, sector by sector in its place. With the option ``header`` both lie in files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.blank_file import make_empty
from cowhand.block.graph import graph
from cowhand.block.node.create_options import FILE_OPTIONS, CreateOption
from cowhand.block.node.node import BlockNode, Capabilities, Child, Limits, Role, Zeroing
from cowhand.block.node.options import NodeOptions, option
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer
from cowhand.core.errors import InvalidArgument, InvalidFormat, NotSupported, ReadOnly
from cowhand.core.extents import ALLOCATED, DATA, ExtentBatch
from cowhand.core.units import MAX_SIZE

if TYPE_CHECKING:
    from cowhand.block.opening.opening import Opening
    from cowhand.crypto.luks import Header
    from cowhand.crypto.volume import Volume

SECTOR = 512
#: A write is encrypted and stored in pieces of this length.
_PIECE = 1 << 20


class LuksOptions(NodeOptions):
    """Options of a LUKS image (QEMU ``qapi/block-core.json``, BlockdevOptionsLUKS)."""

    key_secret: str | None = option(help="id of the secret that opens a key slot")
    max_iterations: int | None = option(
        kind="int",
        help="iterations of SHA-256, or what takes as long, that one passphrase may cost; 0 for any number (150000000: half a minute)",
        strong=False,
    )


_AMENDABLE = (
    CreateOption("state", "str", help="Select new state of affected keyslots (active/inactive)"),
    CreateOption("keyslot", "int", help="Select a single keyslot to modify explicitly"),
    CreateOption("old-secret", "str", help="Select all keyslots that match this password"),
    CreateOption("new-secret", "str", help="New secret to set in the matching keyslots. Empty string to erase"),
    CreateOption("iter-time", "int", help="Time to spend in PBKDF in milliseconds"),
)


class ChildStore:
    """Header and key material at the beginning of *child*'s node."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self._child.read_into(offset, data)
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        self._child.write(offset, (data,))

    def flush(self) -> None:
        self._child.flush()


class LuksNode(BlockNode):
    """A LUKS image. Without a secret (``info``) it tells what its header says, and its data cannot be read."""

    driver: ClassVar[str] = "luks"
    options_class: ClassVar[type[NodeOptions]] = LuksOptions
    is_format: ClassVar[bool] = True
    zero_when_new = False
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "size", help="Virtual disk size"),
        CreateOption("key-secret", "str", help="ID of the secret that provides the keyslot passphrase"),
        CreateOption("cipher-alg", "str", help="Name of encryption cipher algorithm"),
        CreateOption("cipher-mode", "str", help="Name of encryption cipher mode"),
        CreateOption("ivgen-alg", "str", help="Name of IV generator algorithm"),
        CreateOption("ivgen-hash-alg", "str", help="Name of IV generator hash algorithm"),
        CreateOption("hash-alg", "str", help="Name of encryption hash algorithm"),
        CreateOption("iter-time", "int", help="Time to spend in PBKDF in milliseconds"),
        CreateOption("detached-header", "bool"),  # of QEMU 9.0
        *(known for known in FILE_OPTIONS if known.name == "preallocation"),
    )
    options: LuksOptions
    file: Child
    encryption: Header
    volume: Volume | None = None

    # -- making and opening

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise for *options* that :meth:`create` would refuse."""
        from cowhand.crypto import secrets, volume as volumes

        choice = volumes.Choice.of(options)
        secrets.candidates(options.get("key-secret"), "key-secret")
        if size > MAX_SIZE - volumes.header_bytes(choice):
            raise InvalidArgument("The requested file size is too large")

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* a LUKS image of *size* bytes, whose content is what its zeroes decrypt to.

        With ``detached-header`` it gets the header alone: the payload is another file, all of it.
        """
        from cowhand.crypto import secrets, volume as volumes

        cls.check_creation(size, options)
        choice = volumes.Choice.of(options)
        passphrase = secrets.candidates(options.get("key-secret"), "key-secret")[-1]
        begin = volumes.header_bytes(choice)
        node = cls(LuksOptions(read_only=False))
        node.file = graph.attach(node, "file", file, Role.PRIMARY)
        try:
            detached = bool(options.get("detached-header"))
            make_empty(file, begin + (0 if detached else size), preallocation=options.get("preallocation") or "off")
            volumes.make(ChildStore(node.file), choice, passphrase, detached=detached)
        finally:
            node.closed = True
            graph.release(node.file)

    @classmethod
    def measure(
        cls,
        options: Mapping[str, Any],
        size: int | None,
        source_size: int | None,
        data_in_units: Callable[[int], int] | None,
    ) -> tuple[int, int, int]:
        """Return (required, fully allocated, allocation unit) of a new image: the header and every sector."""
        from cowhand.crypto.volume import Choice, header_bytes

        disk = -(-((size or 0) if source_size is None else source_size) // SECTOR) * SECTOR
        total = header_bytes(Choice.of(options)) + disk
        return total, total, 1

    @classmethod
    def open(cls, opening: Opening, options: NodeOptions, given: dict[str, Any]) -> LuksNode:
        assert isinstance(options, LuksOptions)
        node = cls(options)
        file, header = given.pop("file", None), given.pop("header", None)
        if file is None:
            raise InvalidArgument("a LUKS image needs a 'file'", qemu='A block device must be specified for "file"')
        opening.track(node)
        node.file = opening.child(node, "file", file, Role.PRIMARY)
        if header is not None:
            opening.child(node, "header", header, Role.METADATA)
        node.start(unlocked=opening.unlocks)
        return node

    def start(self, *, unlocked: bool) -> None:
        """Read the header; *unlocked*: open it with the secret now, otherwise when data is first asked for."""
        from cowhand.crypto import volume as volumes

        lower = self.header_child.node
        store = ChildStore(self.header_child)
        if unlocked or self.writable:
            self._secrets()  # QEMU asks for the secret before it looks at the header
        self.encryption = header = volumes.read_header(
            store.read, lower.size, self.filename, detached="header" in self.children
        )
        self.offset = header.payload * SECTOR
        if self.offset > self.file.node.size:
            raise InvalidFormat(
                f"the encrypted disk begins at {self.offset}, behind the end of the file", path=self.filename, offset=104,
                qemu="Could not read encryption header",
            )  # fmt: skip
        self.limits = Limits(request_alignment=SECTOR)
        self.capabilities = Capabilities(
            writable=self.writable, zeroes=Zeroing.EMULATED, fua=True, resizable=self.file.node.capabilities.resizable
        )
        if unlocked or self.writable:
            self._unlock()

    def _unlock(self) -> Volume:
        from cowhand.crypto import volume as volumes

        self.volume = volumes.unlock(
            self.encryption, ChildStore(self.header_child), self._secrets(), self.filename, self.options.max_iterations
        )
        return self.volume

    def _secrets(self) -> list[bytes]:
        """Return the passphrases to try. Raises InvalidArgument where there are none."""
        from cowhand.crypto import secrets

        return secrets.candidates(self.options.key_secret, "key-secret", self.filename)

    @property
    def header_child(self) -> Child:
        """The child that holds the LUKS header: the file itself, or the detached one."""
        return self.children.get("header") or self.file

    @property
    def filename(self) -> str:
        if "header" not in self.children:
            return super().filename
        from cowhand.block.node.naming import json_name

        return json_name(self)

    @property
    def size(self) -> int:
        return max(0, self.file.node.size - self.offset) // SECTOR * SECTOR

    def format_specific(self) -> dict[str, Any]:
        from cowhand.crypto.volume import describe

        return describe(self.encryption)

    # -- data

    def _unlocked(self) -> Volume:
        return self.volume if self.volume is not None else self._unlock()

    def read_into(self, offset: int, buffer: Buffer) -> None:
        cipher = self._unlocked().cipher
        view = memoryview(buffer)
        self.file.read_into(self.offset + offset, view)
        cipher.decrypt_into(offset // SECTOR, view)

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        cipher = self._unlocked().cipher
        if len(buffers) == 1:
            view = memoryview(buffers[0])
        else:
            view = memoryview(b"".join(bytes(buffer) for buffer in buffers))
        for begin in range(0, len(view), _PIECE):
            piece = view[begin : begin + _PIECE]
            stored = cipher.encrypt((offset + begin) // SECTOR, piece)
            self.file.write(self.offset + offset + begin, (stored,))
        if fua:
            self.flush()

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if not fallback:
            raise NotSupported("zeroes have to be written as encrypted bytes", path=self.filename, offset=offset)
        for position in range(offset, offset + length, ZEROES_SIZE):
            self.write(position, (ZEROES[: min(ZEROES_SIZE, offset + length - position)],))
        if fua:
            self.flush()

    def discard(self, offset: int, length: int) -> None:
        """Leave everything as it is: holes would tell where the disk is empty."""

    def flush(self) -> None:
        self.file.flush()

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        batch = ExtentBatch()
        batch.add(offset, length, DATA | ALLOCATED)
        return batch

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        if size > MAX_SIZE - self.offset:
            raise InvalidArgument("The requested file size is too large", path=self.filename)
        self.file.node.resize(self.offset + size, preallocation=preallocation, shrink=shrink)

    # -- key slots

    @classmethod
    def amend_options(cls) -> tuple[CreateOption, ...]:
        """Return what :meth:`amend` understands."""
        return _AMENDABLE

    def amend(
        self, options: Mapping[str, Any], progress: Callable[[int, int], None] | None = None, *, force: bool = False
    ) -> None:
        """Add or erase key slots; see :func:`cowhand.crypto.volume.amend`. Raises ReadOnly."""
        from cowhand.crypto.volume import amend

        if not self.writable:
            raise ReadOnly(f"'{self.filename}' is open for reading only", path=self.filename)
        volume = self._unlocked()
        with graph.quiesce(self):
            try:
                amend(volume, ChildStore(self.header_child), options, force=force)
            finally:
                self.encryption = volume.header

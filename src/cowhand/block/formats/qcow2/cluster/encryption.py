"""Encrypted qcow2 images: their data read and written (QEMU ``docs/interop/qcow2``, "Full disk encryption header pointer" and "Data encryption").

LUKS counts sectors by where they lie in the file, the old AES by where the guest has them. Compressed clusters and metadata are not encrypted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2.cluster.mapping import DAMAGED, lost_data
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import InvalidArgument, InvalidFormat
from cowhand.core.extents import DATA, ENCODED, NO_HOST, OFFSET, RECURSE, ZERO, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.ondisk.header import Header
    from cowhand.block.node.node import Child
    from cowhand.core.buffers import Buffer
    from cowhand.crypto.luks import Header as LuksHeader
    from cowhand.crypto.sectors import SectorCipher
    from cowhand.crypto.volume import Volume

_SECTOR = 512
_EXTENSION_BYTES = 16
#: Ours: header and key material of LUKS version 1 take 2 MiB at most.
MAX_HEADER_BYTES = 4 << 20
_NAMES = {L.CRYPT_AES: "aes", L.CRYPT_LUKS: "luks"}
_AES_KEY_BYTES = 16  #: QEMU: longer passphrases are cut, shorter ones padded with zeroes
_PLACED = DATA | OFFSET


class HeaderStore:
    """The LUKS header inside *node*'s file, ``[at, at + length)``."""

    def __init__(self, node: Qcow2Node, at: int, length: int) -> None:
        self._node = node
        self._at = at
        self._length = length

    def _check(self, offset: int, length: int) -> None:
        if offset + length > self._length:
            raise InvalidFormat(
                f"key material at {offset} lies behind the encryption header's {self._length} bytes",
                qemu="Request for data outside of extension header", path=self._node.filename, offset=self._at + offset,
            )  # fmt: skip

    def read(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        data = bytearray(length)
        self._node.file.read_into(self._at + offset, data)
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        self._check(offset, len(data))
        self._node.write_metadata(self._at + offset, data)

    def flush(self) -> None:
        self._node.flush_file()


def header_region(header: Header) -> tuple[int, int]:
    """Return (offset, length) of the LUKS header as *header*'s extension says, (0, 0) where it has none or says what cannot be."""
    data = header.find(L.EXT_CRYPTO)
    if data is None or header.crypt_method != L.CRYPT_LUKS or len(data) != _EXTENSION_BYTES:
        return 0, 0
    at, length = L.U64.unpack_from(data)[0], L.U64.unpack_from(data, 8)[0]
    possible = at and at < L.MAX_HOST_OFFSET and not at % header.cluster_size and length <= MAX_HEADER_BYTES
    return (at, length) if possible else (0, 0)


class Encryption:
    """How *node*'s data clusters are encrypted; *given* are the options under ``encrypt``. Unlocked when data is first asked for, or before."""

    def __init__(self, node: Qcow2Node, given: Mapping[str, Any]) -> None:
        self._node = node
        self.format = _NAMES[node.header.crypt_method]
        self.luks: LuksHeader | None = None
        self._at = self._length = 0
        self.volume: Volume | None = None
        self._secret: str | None = given.get("key-secret")
        self._max_iterations = _number(given.get("max-iterations"))
        #: What of *given* a reader's view depends on, for the image's printed name.
        self.strong = {"encrypt.key-secret": self._secret} if self._secret is not None else {}
        self._cipher: SectorCipher | None = None
        asked = given.get("format")
        if asked is not None and asked != self.format:
            raise InvalidArgument(
                f"Header reported '{self.format}' encryption format but options specify '{asked}'", path=node.filename
            )
        if self.format == "luks":
            self._read_header()

    def _read_header(self) -> None:
        from cowhand.crypto import luks

        node = self._node
        path = node.filename
        data = node.header.find(L.EXT_CRYPTO)
        if data is None:
            raise InvalidFormat(f"Missing CRYPTO header for crypt method {L.CRYPT_LUKS}", path=path, offset=32)
        if len(data) != _EXTENSION_BYTES:
            raise InvalidFormat(
                f"CRYPTO header extension size {len(data)}, but expected size {_EXTENSION_BYTES}", path=path, offset=node.header.header_length
            )  # fmt: skip
        self._at, length = L.U64.unpack_from(data)[0], L.U64.unpack_from(data, 8)[0]
        if self._at % node.cluster_size or not self._at or self._at >= L.MAX_HOST_OFFSET:
            raise InvalidFormat(
                f"Encryption header offset '{self._at}' is not a multiple of cluster size '{node.cluster_size}'", path=path,
                offset=node.header.header_length,
            )  # fmt: skip
        if not luks.HEADER_BYTES <= length <= MAX_HEADER_BYTES:
            raise InvalidFormat(
                f"an encryption header of LUKS has {luks.HEADER_BYTES} to {MAX_HEADER_BYTES} bytes, not {length}",
                path=path,
                offset=self._at,
            )
        self._length = length
        self.luks = luks.parse(self.header_store().read(0, luks.HEADER_BYTES), path, at=self._at)

    def header_store(self) -> HeaderStore:
        """Return where LUKS's header and key material are."""
        return HeaderStore(self._node, self._at, self._length)

    def unlock(self) -> SectorCipher:
        """Return the cipher of the data, made from the secret when it is first asked for. Raises InvalidArgument, AccessDenied."""
        if self._cipher is not None:
            return self._cipher
        from cowhand.crypto import secrets
        from cowhand.crypto.sectors import SectorCipher
        from cowhand.crypto.volume import MAX_ITERATIONS_OPTION, unlock

        tried = secrets.candidates(self._secret, "encrypt.key-secret", self._node.filename)
        if self.luks is None:
            # The old AES cannot tell whether a passphrase is right.
            key = tried[0][:_AES_KEY_BYTES].ljust(_AES_KEY_BYTES, b"\0")
            self._cipher = SectorCipher("aes-128", "cbc", "plain64", key)
        else:
            self.volume = unlock(
                self.luks, self.header_store(), tried, self._node.filename, self._max_iterations, f"encrypt.{MAX_ITERATIONS_OPTION}"
            )  # fmt: skip
            self._cipher = self.volume.cipher
        return self._cipher

    def of(self, node: Qcow2Node) -> Encryption:
        """Return the same for *node*, another view of the image."""
        self.unlock()
        other = copy.copy(self)
        other._node = node
        return other

    def run(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        """Return the mapping's run, its data marked as encoded."""
        count, flags, child, host = self._node.mapping.run(offset, length)
        if flags & (_PLACED | ZERO) == _PLACED:
            flags |= ENCODED
        return count, flags, child, host

    def decode(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        """Fill *view* with the plain bytes of guest *offset*, whose ciphertext *run* places."""
        cipher = self.unlock()
        _, _, child, host = run
        assert child is not None
        begin = offset % _SECTOR
        padded = -(-(begin + len(view)) // _SECTOR) * _SECTOR
        whole = view if padded == len(view) else memoryview(bytearray(padded))
        if host - begin + padded > self._node.mapping.end - self._node.cluster_size:
            self._require(child, host - begin, padded, offset - begin)
        child.read_into(host - begin, whole)
        cipher.decrypt_into((host if self.luks is not None else offset) // _SECTOR, whole)
        if whole is not view:
            view[:] = whole[begin : begin + len(view)]

    def _require(self, child: Child, host: int, length: int, guest: int) -> None:
        """Raise ImageCorrupt where the file ends before the ciphertext of whole sectors does: zeroes are nobody's ciphertext."""
        end = child.node.size
        if host + length > end and not self._node.cut_reads_as_zeroes:
            inside = max(0, end - host) // _SECTOR * _SECTOR
            raise lost_data(child, host + inside, guest + inside)

    def encode(self, host: int, offset: int, data: memoryview) -> Buffer:
        """Return the ciphertext of *data*, whole sectors of the guest's *offset*, which is to lie at *host*."""
        return self.unlock().encrypt((host if self.luks is not None else offset) // _SECTOR, data)

    def moved(self, host: int, target: int, data: bytearray) -> None:
        """Change *data*, ciphertext that lies at *host*, into what means the same at *target*."""
        if self.luks is not None:
            cipher = self.unlock()
            cipher.decrypt_into(host // _SECTOR, memoryview(data))
            data[:] = cipher.encrypt(target // _SECTOR, data)

    def describe(self) -> dict[str, Any]:
        """Return what ``info`` tells, keys as in QEMU's JSON."""
        if self.luks is None:
            return {"format": self.format}
        from cowhand.crypto.volume import describe

        return {"format": self.format, **describe(self.luks)}


def without_places(node: Qcow2Node, batch: ExtentBatch) -> ExtentBatch:
    """Return *batch*, of *node*, without the places of data: what lies there is not what the guest reads."""
    out = ExtentBatch()
    # Clusters may be cut off at the end of the file, sectors may not: what they would decrypt to is nobody's data.
    end = 1 << 63 if node.cut_reads_as_zeroes else node.data_child.node.size // _SECTOR * _SECTOR
    for row in batch:
        if row.flags & (_PLACED | ZERO) == _PLACED:
            inside = min(row.length, max(0, end - row.host))
            if inside:
                out.add(row.start, inside, row.flags & ~(OFFSET | RECURSE), NO_HOST, None)
            if inside < row.length:
                out.add(row.start + inside, row.length - inside, DAMAGED, node=node)
        else:
            out.add(row.start, row.length, row.flags, row.host, row.node)
    return out


def _number(value: Any) -> int | None:
    """Return the value of the option encrypt.max-iterations, a number or its digits; raises InvalidArgument for anything else."""
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | str)
        or not str(value).isdecimal()
        or len(str(value)) > 20
    ):
        raise InvalidArgument("Parameter 'encrypt.max-iterations' expects a number")
    return int(value)


def configure(node: Qcow2Node, given: Any, *, unlocked: bool) -> Encryption | None:
    """Return how *node* is encrypted, or None; *unlocked* asks for the secret at once. Raises InvalidArgument for options that do not fit."""
    options = given if isinstance(given, Mapping) else {}
    for name in options:
        if name not in ("format", "key-secret", "max-iterations"):
            raise InvalidArgument(f"Block format 'qcow2' does not support the option 'encrypt.{name}'")
    if not node.header.crypt_method:
        if options.get("format") is not None:
            raise InvalidArgument(
                f"No encryption in image header, but options specified format '{options['format']}'", path=node.filename
            )
        return None
    encryption = Encryption(node, options)
    if unlocked:
        encryption.unlock()
    return encryption

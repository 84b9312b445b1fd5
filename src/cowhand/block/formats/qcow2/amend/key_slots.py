"""Making encrypted qcow2 images, and changing their key slots (QEMU ``docs/interop/qcow2``, "Full disk encryption header pointer").

The LUKS header gets clusters of its own, behind the tables, as ``qemu-img create`` places them. A change of a slot writes inside them only; see
:mod:`cowhand.crypto.volume` for why a crash costs no more than that slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.formats.qcow2.cluster.encryption import HeaderStore
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.node.node import Zeroing
from cowhand.core.buffers import ZEROES, ZEROES_SIZE
from cowhand.core.errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.crypto.volume import Choice

PREFIX = "encrypt."
SECRET = "encrypt.key-secret"
_METHODS = {"aes": L.CRYPT_AES, "luks": L.CRYPT_LUKS}


class EncryptionPlan(NamedTuple):
    """How a new image is to be encrypted; ``choice`` for LUKS only."""

    method: int
    passphrase: bytes
    choice: Choice | None


def method_of(options: Mapping[str, Any]) -> int:
    """Return which method creation *options* ask for, ``L.CRYPT_NONE`` for none. Raises InvalidArgument in QEMU's words."""
    name = options.get("encrypt.format")
    if options.get("encryption"):
        if name is not None:
            raise InvalidArgument("'encrypt.format' and its alias 'encryption' can't be used at the same time")
        name = "aes"
    given = [known for known, value in options.items() if known.startswith(PREFIX) and value is not None]
    if name is None:
        if given:
            raise InvalidArgument("Parameter 'encrypt.format' is missing", hint="It is luks, or the old aes.")
        return L.CRYPT_NONE
    method = _METHODS.get(name)
    if method is None:
        raise InvalidArgument(f"Parameter 'format' does not accept value '{name}'", hint="It is luks, or the old aes.")
    if method == L.CRYPT_AES:
        for known in given:
            if known not in ("encrypt.format", "encrypt.key-secret"):
                raise InvalidArgument(f"Parameter '{known}' is unexpected", hint="The old AES has no such choice.")
    return method


def check_values(options: Mapping[str, Any]) -> None:
    """Refuse a method, cipher, mode or hash that there is not. Raises InvalidArgument and UnsupportedFeature."""
    if method_of(options) == L.CRYPT_LUKS:
        from cowhand.crypto.volume import Choice

        Choice.of(options, PREFIX)


def plan(options: Mapping[str, Any]) -> EncryptionPlan | None:
    """Return how an image made with *options* is to be encrypted. Raises InvalidArgument and UnsupportedFeature before anything is made."""
    method = method_of(options)
    if not method:
        return None
    from cowhand.crypto import secrets
    from cowhand.crypto.volume import Choice

    choice = Choice.of(options, PREFIX) if method == L.CRYPT_LUKS else None
    # Of those that are offered the new image's own comes last.
    return EncryptionPlan(method, secrets.candidates(options.get(SECRET), SECRET)[-1], choice)


def header_length(options: Mapping[str, Any]) -> int:
    """Return the bytes that the encryption header of an image made with *options* takes: whole ones, not clusters."""
    if method_of(options) != L.CRYPT_LUKS:
        return 0
    from cowhand.crypto import secrets
    from cowhand.crypto.volume import Choice, header_bytes

    choice = Choice.of(options, PREFIX)
    if options.get(SECRET) is None:
        secrets.candidates(None, SECRET)
    return header_bytes(choice)


def make(node: Qcow2Node, plan: EncryptionPlan) -> None:
    """Have *node*, a new image that nobody uses, encrypted as *plan* says; clusters that it has hold garbage afterwards."""
    place = None
    if plan.choice is not None:
        from cowhand.crypto import volume

        length = volume.header_bytes(plan.choice)
        with node.exclusive():
            at = node.allocator.take(-(-length // node.cluster_size)) * node.cluster_size
            node.write_back.flush_refcounts()
        _clear(node, at, -(-length // node.cluster_size) * node.cluster_size)
        volume.make(HeaderStore(node, at, length), plan.choice, plan.passphrase)
        place = L.U64.pack(at) + L.U64.pack(length)
    with node.rewriting_header() as header:
        if place is not None:
            header.set(L.EXT_CRYPTO, place)
        header.crypt_method = plan.method


def _clear(node: Qcow2Node, at: int, length: int) -> None:
    """Zero ``[at, at + length)`` of the file: most of the slots stay unwritten."""
    if node.file.node.capabilities.zeroes is not Zeroing.NONE:
        node.file.write_zeroes(at, length, unmap=True)
        return
    for position in range(at, at + length, ZEROES_SIZE):
        node.file.write(position, (ZEROES[: min(ZEROES_SIZE, at + length - position)],))


def amends(options: Mapping[str, Any]) -> bool:
    """Tell whether *options* of an amendment concern the encryption."""
    return any(name.startswith(PREFIX) for name in options)


def refuse_amending(node: Qcow2Node) -> None:
    """Raise unless *node* has key slots."""
    if node.encryption is None:
        raise NotSupported("Can't amend encryption options - encryption not present", path=node.filename)
    if node.encryption.luks is None:
        raise NotSupported("Only LUKS encryption options can be amended", path=node.filename)


def amend(node: Qcow2Node, options: Mapping[str, Any], *, force: bool) -> None:
    """Add or erase key slots of *node* as the options under ``encrypt.`` say; see :func:`cowhand.crypto.volume.amend`."""
    from cowhand.crypto import volume

    encryption = node.encryption
    assert encryption is not None
    encryption.unlock()
    assert encryption.volume is not None
    try:
        volume.amend(encryption.volume, encryption.header_store(), options, force=force, prefix=PREFIX)
    finally:
        encryption.luks = encryption.volume.header

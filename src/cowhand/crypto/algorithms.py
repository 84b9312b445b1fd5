"""The algorithms of LUKS version 1 ("LUKS1 On-Disk Format Specification" 1.2.3, section 6) by the names that QEMU gives them."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Protocol

from cowhand.core.errors import InvalidArgument, UnsupportedFeature


class Ecb(Protocol):
    """A block cipher with its key, a block at a time; used by one thread. A buffer has room for 15 bytes more than the data."""

    def encrypt(self, data: bytes | memoryview) -> bytes: ...
    def decrypt(self, data: bytes | memoryview) -> bytes: ...
    def encrypt_into(self, data: bytes | memoryview, buffer: bytearray) -> object: ...
    def decrypt_into(self, data: bytes | memoryview, buffer: bytearray) -> object: ...


class Algorithm(NamedTuple):
    """A cipher: QEMU's name of it, its name in a LUKS header, length of its key and block in bytes."""

    name: str
    family: str
    key_bytes: int
    block_bytes: int

    @property
    def available(self) -> bool:
        """Whether there is an implementation: some are taken from the system's libraries."""
        if self.family not in _OF_THE_SYSTEM:
            return True
        from cowhand.crypto import native

        return native.available(self.family, self.key_bytes)


_OF_THE_SYSTEM = ("serpent", "twofish")
_TABLE = (
    *(Algorithm(f"aes-{bits}", "aes", bits // 8, 16) for bits in (128, 192, 256)),
    Algorithm("cast5-128", "cast5", 16, 8),
    *(Algorithm(f"serpent-{bits}", "serpent", bits // 8, 16) for bits in (128, 192, 256)),
    *(Algorithm(f"twofish-{bits}", "twofish", bits // 8, 16) for bits in (128, 192, 256)),
)
CIPHERS = {algorithm.name: algorithm for algorithm in _TABLE}
#: Known to QEMU, and never used on disks by it.
_OTHER_CIPHERS = ("des", "3des")
MODES = ("ecb", "cbc", "xts", "ctr")
IV_GENERATORS = ("plain", "plain64", "essiv")
HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")


def cipher_named(name: str) -> Algorithm:
    """Return the cipher *name* ("aes-256"). Raises InvalidArgument for an unknown one, UnsupportedFeature for one without implementation."""
    found = CIPHERS.get(name)
    if found is None and name in _OTHER_CIPHERS:
        raise UnsupportedFeature(f"Algorithm '{name}' not supported")
    if found is None:
        raise InvalidArgument(
            f"Parameter 'cipher-alg' does not accept value '{name}'", hint="One of: " + ", ".join(CIPHERS)
        )
    if not found.available:
        raise UnsupportedFeature(
            f"the cipher '{name}' is not available here: neither Nettle nor Libgcrypt offers it",
            qemu=f"Algorithm '{name}' not supported", hint="Install one of these libraries (Debian: libnettle8, libgcrypt20).",
        )  # fmt: skip
    return found


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return *value*, the option *name*, if it is one of *choices*; raises InvalidArgument."""
    if value not in choices:
        raise InvalidArgument(
            f"Parameter '{name}' does not accept value '{value}'", hint="One of: " + ", ".join(choices)
        )
    return value


def digest_size(name: str) -> int:
    """Return the bytes that hash *name* makes. Raises UnsupportedFeature where this system's OpenSSL leaves it out."""
    return digest(name, b"", size_only=True).__len__()


def digest(name: str, data: bytes, *, size_only: bool = False) -> bytes:
    """Return the hash *name* of *data*."""
    try:
        return hashlib.new(name, data, usedforsecurity=not size_only).digest()
    except ValueError as error:
        raise UnsupportedFeature(
            f"the hash '{name}' is not available here", qemu=f"Hash algorithm '{name}' is not supported"
        ) from error


class _LibraryEcb:
    """ECB by the library ``cryptography``; what was fed in whole blocks leaves no state behind."""

    def __init__(self, algorithm: Any) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, modes

        cipher = Cipher(algorithm, modes.ECB())
        forward, backward = cipher.encryptor(), cipher.decryptor()
        self.encrypt, self.encrypt_into = forward.update, forward.update_into
        self.decrypt, self.decrypt_into = backward.update, backward.update_into


def ecb(algorithm: Algorithm, key: bytes) -> Ecb:
    """Return *algorithm* with *key*, of the right length."""
    if len(key) != algorithm.key_bytes:
        raise InvalidArgument(f"a key for {algorithm.name} has {algorithm.key_bytes} bytes, not {len(key)}")
    if algorithm.family == "aes":
        from cryptography.hazmat.primitives.ciphers.algorithms import AES

        return _LibraryEcb(AES(key))
    if algorithm.family in _OF_THE_SYSTEM:
        from cowhand.crypto import native

        found = native.ecb(algorithm.family, key)
        assert found is not None, "looked for when the name was"
        return found
    from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5

    return _LibraryEcb(CAST5(key))

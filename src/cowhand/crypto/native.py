"""Block ciphers that ``cryptography`` lacks, from a library of the system: Nettle, or Libgcrypt where that is absent.

Both work on runs of blocks in one call, without the interpreter lock. Loaded when such a cipher is first asked for.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from typing import Any

from cowhand.core.buffers import Buffer

#: File names of the libraries' versions, newest first: both keep these functions from one version to the next.
_NETTLE = ("libnettle.so.9", "libnettle.so.8", "libnettle.so.7", "libnettle.so.6", "libnettle.dylib")
_GCRYPT = ("libgcrypt.so.20", "libgcrypt.dylib")
#: More than any key schedule of these ciphers takes (Twofish: 4,256 bytes).
_CONTEXT_BYTES = 16384
#: GCRY_CIPHER_* by (family, bytes of the key), and GCRY_CIPHER_MODE_ECB.
_GCRYPT_NUMBERS = {
    ("serpent", 16): 304,
    ("serpent", 24): 305,
    ("serpent", 32): 306,
    ("twofish", 16): 303,
    ("twofish", 32): 10,
}
_GCRYPT_ECB = 1
_lock = threading.Lock()


class NativeEcb:
    """A block cipher with its key; ``encrypt`` and ``decrypt`` take whole blocks."""

    def __init__(self, forward: Any, backward: Any, context: Any) -> None:
        self._forward = forward
        self._backward = backward
        self._context = context  # kept for as long as the functions are called with it

    def encrypt(self, data: Buffer) -> bytes:
        return self._run(self._forward, data)

    def decrypt(self, data: Buffer) -> bytes:
        return self._run(self._backward, data)

    def encrypt_into(self, data: Buffer, buffer: bytearray) -> None:
        buffer[: len(data)] = self._run(self._forward, data)

    def decrypt_into(self, data: Buffer, buffer: bytearray) -> None:
        buffer[: len(data)] = self._run(self._backward, data)

    def _run(self, function: Any, data: Buffer) -> bytes:
        source = bytes(data)
        target = ctypes.create_string_buffer(len(source))
        function(self._context, len(source), target, source)
        return target.raw


def ecb(family: str, key: bytes) -> NativeEcb | None:
    """Return the cipher *family* ("serpent", "twofish") with *key*, or None where no library of this system has it."""
    return _nettle_ecb(family, key) or _gcrypt_ecb(family, key)


@lru_cache(maxsize=32)
def available(family: str, key_bytes: int) -> bool:
    """Tell whether :func:`ecb` has a cipher for such keys."""
    return ecb(family, bytes(range(key_bytes))) is not None


@lru_cache(maxsize=4)
def _library(names: tuple[str, ...]) -> Any:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _nettle_ecb(family: str, key: bytes) -> NativeEcb | None:
    library = _library(_NETTLE)
    if library is None:
        return None
    try:
        set_key, forward, backward = (
            getattr(library, f"nettle_{family}_{verb}") for verb in ("set_key", "encrypt", "decrypt")
        )
    except AttributeError:
        return None
    set_key.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    set_key.restype = None
    for function in (forward, backward):
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p)
        function.restype = None
    context = ctypes.create_string_buffer(_CONTEXT_BYTES)
    set_key(context, len(key), key)
    return NativeEcb(forward, backward, context)


class _GcryptHandle:
    """An open cipher of Libgcrypt."""

    def __init__(self, library: Any, number: int, key: bytes) -> None:
        self._library = library
        self._handle = ctypes.c_void_p()
        library.gcry_cipher_open.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint)
        library.gcry_cipher_close.argtypes = (ctypes.c_void_p,)
        for name in ("gcry_cipher_encrypt", "gcry_cipher_decrypt"):
            arguments = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
            getattr(library, name).argtypes = arguments
        library.gcry_cipher_setkey.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
        self.opened = not library.gcry_cipher_open(ctypes.byref(self._handle), number, _GCRYPT_ECB, 0)
        self.opened = self.opened and not library.gcry_cipher_setkey(self._handle, key, len(key))

    def forward(self, _: object, length: int, target: Any, source: bytes) -> None:
        self._check(self._library.gcry_cipher_encrypt(self._handle, target, length, source, length))

    def backward(self, _: object, length: int, target: Any, source: bytes) -> None:
        self._check(self._library.gcry_cipher_decrypt(self._handle, target, length, source, length))

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise AssertionError(f"Libgcrypt refused whole blocks (error {code})")

    def __del__(self) -> None:
        if self._handle.value:
            self._library.gcry_cipher_close(self._handle)


def _gcrypt_ecb(family: str, key: bytes) -> NativeEcb | None:
    library, number = _library(_GCRYPT), _GCRYPT_NUMBERS.get((family, len(key)))
    if library is None or number is None:
        return None
    with _lock:
        # Initialises the library; not by two threads at once.
        library.gcry_check_version(None)
    handle = _GcryptHandle(library, number, key)
    return NativeEcb(handle.forward, handle.backward, handle) if handle.opened else None

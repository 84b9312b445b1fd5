"""Keys from passphrases: PBKDF2 (RFC 8018, section 5.2) and LUKS's anti-forensic splitter ("LUKS1 On-Disk Format Specification", section 2.4)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from cowhand.core.errors import UnsupportedFeature
from cowhand.crypto.algorithms import digest_size

_TRIAL_SECONDS = 0.05


def pbkdf2(name: str, password: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """Return *length* bytes derived from *password*; takes time in proportion to *iterations*, which the caller has bounded."""
    try:
        return hashlib.pbkdf2_hmac(name, password, salt, iterations, length)
    except ValueError as error:
        raise UnsupportedFeature(
            f"the hash '{name}' is not available here", qemu=f"Hash algorithm '{name}' is not supported"
        ) from error


def iterations_for(name: str, length: int, milliseconds: int) -> int:
    """Return how many iterations take about *milliseconds* on this machine, by trying."""
    count = 4096
    while True:
        begin = time.process_time()
        pbkdf2(name, b"trial", bytes(32), count, length)
        spent = time.process_time() - begin
        if spent >= _TRIAL_SECONDS:
            return int(count / spent * milliseconds / 1000)
        count *= 4


def _diffuse(name: str, data: bytes) -> bytes:
    size, make = _hash(name)
    parts = (data[at : at + size] for at in range(0, len(data), size))
    return b"".join(make(index.to_bytes(4, "big") + part).digest()[: len(part)] for index, part in enumerate(parts))


@lru_cache(maxsize=8)
def _hash(name: str) -> tuple[int, Callable[[bytes], Any]]:
    """Return the size of the hash *name* and what makes it: four thousand of them open one key slot."""
    return digest_size(name), getattr(hashlib, name, None) or partial(hashlib.new, name)


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")


def split(name: str, key: bytes, stripes: int, random: bytes) -> bytes:
    """Return *key* spread over *stripes* times its length, with (stripes - 1) times its length of *random* bytes."""
    size = len(key)
    state = bytes(size)
    for at in range(0, (stripes - 1) * size, size):
        state = _diffuse(name, _xor(state, random[at : at + size]))
    return random[: (stripes - 1) * size] + _xor(state, key)


def merge(name: str, material: bytes, stripes: int) -> bytes:
    """Return the key that *material* holds; the inverse of :func:`split`."""
    size = len(material) // stripes
    state = bytes(size)
    for at in range(0, (stripes - 1) * size, size):
        state = _diffuse(name, _xor(state, material[at : at + size]))
    return _xor(state, material[(stripes - 1) * size : stripes * size])

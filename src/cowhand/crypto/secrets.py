"""Secrets by id, as images' options name them ("key-secret"): never printed, never part of an image's name (QEMU ``qapi/crypto.json``, Secret).

One table for the process, like QEMU's objects; :func:`given` holds some for the time of a call.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from cowhand.core.errors import InvalidArgument, from_os_error

#: A passphrase or key is shorter; a file that is not one is not read whole.
MAX_SECRET_BYTES = 1 << 20

_table: dict[str, bytes] = {}
#: For images whose options name no secret.
_offered: list[bytes] = []


def add(ident: str, data: bytes) -> None:
    """Keep *data* under *ident*, in place of what had that id."""
    _table[ident] = bytes(data)


def remove(ident: str) -> None:
    """Forget *ident*."""
    _table.pop(ident, None)


@contextmanager
def given(secrets: Mapping[str, bytes | str] | None) -> Iterator[None]:
    """Hold *secrets*, passphrases by the ids that ``key-secret`` options name, while a ``with`` block runs.

    An earlier secret of the same id comes back afterwards. They are the process's, not the thread's: blocks that run
    at the same time need ids of their own.
    """
    before = {ident: _table.get(ident) for ident in secrets or {}}
    for ident, data in (secrets or {}).items():
        add(ident, data.encode() if isinstance(data, str) else data)
    try:
        yield
    finally:
        for ident, old in before.items():
            if old is None:
                remove(ident)
            else:
                add(ident, old)


@contextmanager
def offering(passphrases: Sequence[bytes]) -> Iterator[None]:
    """Offer *passphrases*, while the block runs, to encrypted images whose options name no secret; the first one that fits opens them."""
    before = list(_offered)
    _offered.extend(passphrases)
    try:
        yield
    finally:
        _offered[:] = before


def known() -> frozenset[str]:
    """Return the ids that name a secret."""
    return frozenset(_table)


def candidates(ident: str | None, option: str, path: str | None = None) -> list[bytes]:
    """Return the passphrases that may open an image: the one that *option* names by *ident*, or those that are offered.

    Raises InvalidArgument where there is none.
    """
    if ident is not None:
        return [passphrase(ident)]
    if not _offered:
        raise InvalidArgument(
            f"the image is encrypted, and its passphrase was not given: {option} names no secret",
            qemu=f"Parameter '{option}' is required for cipher", path=path,
            hint="Give it with --secret (asks on the terminal) or --key-file FILE; in a library call, with secrets= and that option.",
        )  # fmt: skip
    return list(_offered)


def lookup(ident: str) -> bytes:
    """Return the secret of that id. Raises InvalidArgument."""
    data = _table.get(ident)
    if data is None:
        raise InvalidArgument(f"No secret with id '{ident}'", hint="Give it beside the image, with that id.")
    return data


def passphrase(ident: str) -> bytes:
    """Return the secret of that id, which has to be text. Raises InvalidArgument."""
    data = lookup(ident)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidArgument(f"Data from secret {ident} is not valid UTF-8") from None
    return data


def load(properties: Mapping[str, str]) -> bytes:
    """Return the secret that *properties* (data or file, format, keyid, iv) describe. Raises InvalidArgument and what reading a file raises."""
    if "data" in properties and "file" in properties:
        raise InvalidArgument("'file' and 'data' are mutually exclusive")
    if "file" in properties:
        data = read_file(properties["file"])
    elif "data" in properties:
        data = properties["data"].encode("utf-8", "surrogateescape")
    else:
        raise InvalidArgument("Either 'file' or 'data' must be provided")
    if properties.get("keyid") is not None:
        return _decrypted(data, properties)
    return _from_base64(data) if properties.get("format") == "base64" else data


def read_file(path: str) -> bytes:
    """Return what the file *path* holds, byte for byte."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        failure = from_os_error(error, path, doing="reading a secret")
        failure.qemu_message = f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}"
        raise failure from None
    if len(data) > MAX_SECRET_BYTES:
        raise InvalidArgument(f"a secret has at most {MAX_SECRET_BYTES} bytes", path=path)
    return data


def _from_base64(data: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument("the secret is not base64", qemu="Base64 data contains invalid characters") from None


def _decrypted(data: bytes, properties: Mapping[str, str]) -> bytes:
    """Decrypt *data* with the secret ``keyid``: AES-256 in CBC mode, padded as PKCS #7 says."""
    key = lookup(properties["keyid"])
    if len(key) != 32:
        raise InvalidArgument("Key should be 32 bytes in length")
    if properties.get("iv") is None:
        raise InvalidArgument("IV is required to decrypt secret")
    vector = _from_base64(properties["iv"].encode())
    if len(vector) != 16:
        raise InvalidArgument(f"IV should be 16 bytes in length not {len(vector)}")
    # Where the format is raw the ciphertext is taken as it is.
    data = _from_base64(data) if properties.get("format") == "base64" else data
    if not data or len(data) % 16:
        raise InvalidArgument(f"Length {len(data)} must be a multiple of block size 16")
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    decryptor = Cipher(algorithms.AES(key), modes.CBC(vector)).decryptor()
    plain = decryptor.update(data) + decryptor.finalize()
    padding = plain[-1]
    if not 1 <= padding <= 16:
        raise InvalidArgument(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return plain[:-padding]

"""TLS credentials: X.509 certificates or pre-shared keys, as QEMU lays them out in a folder, and the contexts that are made of them.

Sources: QEMU ``docs/system/tls.rst`` (names of the files, what each end verifies), ``tls-creds-x509`` and ``tls-creds-
psk``. Pre-shared keys are in Python's own ``ssl`` from 3.13 on, before that in the package ``sslpsk3`` (the extra
"psk").
"""

from __future__ import annotations

import binascii
import errno
import os
import ssl
from dataclasses import dataclass
from typing import Any, Protocol

from cowhand.core.errors import InvalidArgument, NotSupported, from_os_error

#: A file of keys is shorter; one that is not is not read whole.
MAX_KEYS = 1 << 20
DEFAULT_USER = "qemu"
#: Keys without certificates: with forward secrecy, and without it for peers that have nothing else.
_PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:DHE-PSK-AES256-GCM-SHA384:PSK-AES256-GCM-SHA384"


class Credentials(Protocol):
    """What one end proves itself with."""

    def server(self) -> ssl.SSLContext:
        """Return the context of a server. Raises CowhandError."""
        ...

    def client(self) -> ssl.SSLContext:
        """Return the context of a client. Raises CowhandError."""
        ...


@dataclass(frozen=True, slots=True)
class X509:
    """Certificates in *folder*: ca-cert.pem, ca-crl.pem, server-cert.pem, server-key.pem, client-cert.pem, client-key.pem.

    With *verify_peer* a server wants a certificate of its clients too; a client always verifies, unless it is off.
    """

    folder: str
    verify_peer: bool = True

    def _path(self, name: str, *, needed: bool) -> str | None:
        path = os.path.join(self.folder, name)
        try:
            with open(path, "rb"):
                return path
        except OSError as error:
            if not needed and error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            told = from_os_error(error, path)
            raise type(told)(
                told.message, qemu=f"Unable to access credentials {path}: {os.strerror(error.errno or 0)}", path=path
            ) from error

    def _context(self, protocol: int, end: str, *, certificate: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        authorities = self._path("ca-cert.pem", needed=True)
        revoked = self._path("ca-crl.pem", needed=False)
        chain = self._path(f"{end}-cert.pem", needed=certificate)
        key = self._path(f"{end}-key.pem", needed=chain is not None)
        try:
            context.load_verify_locations(authorities)
            if revoked is not None:
                context.load_verify_locations(revoked)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
            if chain is not None:
                # A key that is encrypted is an error, not a question on the terminal.
                context.load_cert_chain(chain, key, password=lambda: b"")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise InvalidArgument(
                f"the certificates in '{self.folder}' cannot be used: {_words(error)}", path=self.folder
            ) from error
        return context

    def server(self) -> ssl.SSLContext:
        context = self._context(ssl.PROTOCOL_TLS_SERVER, "server", certificate=True)
        context.verify_mode = ssl.CERT_REQUIRED if self.verify_peer else ssl.CERT_NONE
        return context

    def client(self) -> ssl.SSLContext:
        context = self._context(ssl.PROTOCOL_TLS_CLIENT, "client", certificate=False)
        if not self.verify_peer:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class SystemAuthorities:
    """A client that trusts whom the system trusts, and proves nothing of itself."""

    def server(self) -> ssl.SSLContext:
        raise InvalidArgument("a server needs certificates or keys of its own")

    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


@dataclass(frozen=True, slots=True)
class PresharedKeys:
    """Keys in a file, a line ``USER:HEXADECIMAL KEY`` for each; a client is *user*."""

    path: str
    user: str = DEFAULT_USER

    def _keys(self) -> dict[str, bytes]:
        try:
            with open(self.path, "rb") as file:
                data = file.read(MAX_KEYS + 1)
        except OSError as error:
            told = from_os_error(error, self.path)
            raise type(told)(
                told.message,
                qemu=f"Unable to access credentials {self.path}: {os.strerror(error.errno or 0)}",
                path=self.path,
            ) from error
        keys: dict[str, bytes] = {}
        for line in data.decode("utf-8", "surrogateescape").splitlines():
            user, colon, text = line.strip().rpartition(":")
            if not colon or line.startswith("#"):
                continue
            try:
                keys[user] = binascii.unhexlify(text)
            except ValueError:
                raise InvalidArgument(
                    f"the key of '{user}' in '{self.path}' is not hexadecimal", path=self.path
                ) from None
        if len(data) > MAX_KEYS or not keys:
            raise InvalidArgument(
                f"'{self.path}' is no file of keys",
                path=self.path,
                hint="A line is USER:KEY; psktool makes such files.",
            )
        return keys

    def server(self) -> ssl.SSLContext:
        keys = self._keys()
        context: Any = _psk_context(ssl.PROTOCOL_TLS_SERVER)
        # A key that is not known is none: no client has an empty one.
        context.set_psk_server_callback(lambda user: keys.get(user or "", b""))
        return context  # type: ignore[no-any-return]

    def client(self) -> ssl.SSLContext:
        key = self._keys().get(self.user)
        if key is None:
            raise InvalidArgument(f"'{self.path}' has no key of user '{self.user}'", path=self.path)
        context: Any = _psk_context(ssl.PROTOCOL_TLS_CLIENT)
        context.set_psk_client_callback(lambda hint: (self.user, key))
        return context  # type: ignore[no-any-return]


def _psk_context(protocol: int) -> ssl.SSLContext:
    kind: Any = ssl.SSLContext
    if not hasattr(kind, "set_psk_server_callback"):
        try:
            from sslpsk3 import SSLPSKContext as kind  # type: ignore[no-redef,import-untyped,import-not-found,unused-ignore]
        except ImportError:
            raise NotSupported(
                "this Python's ssl has no pre-shared keys",
                hint="Python 3.13 has them; before it, the package sslpsk3 does: pip install 'cowhand[psk]'.",
            ) from None
    context: ssl.SSLContext = kind(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_PSK_CIPHERS)
    return context


def _words(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


# -- by id, as QEMU's options name them

_table: dict[str, Credentials] = {}


def add(ident: str, credentials: Credentials) -> None:
    """Keep *credentials* under *ident*."""
    _table[ident] = credentials


def find(ident: str) -> Credentials:
    """Return what *ident* names. Raises InvalidArgument."""
    if ident not in _table:
        raise InvalidArgument(f"No TLS credentials with id '{ident}'")
    return _table[ident]

"""TLS over bytes: what was received goes in, what is to be sent comes out. No sockets.

Source: NetworkBlockDevice ``doc/proto.md``, "TLS support". Thread-safe: one lock is held for each step, never while
anything waits, so that one thread can receive while another sends.
"""

from __future__ import annotations

import ssl
import threading
from typing import Any

from cowhand.core.buffers import Buffer
from cowhand.core.errors import CowhandError

#: Bytes that are encrypted at once: 16 records.
CHUNK = 256 << 10


class TlsFailed(CowhandError):
    """The other end could not be trusted, or did not speak TLS."""

    code = "tls"
    exit_code = 3


class TlsStream:
    """One end of a TLS connection. *hostname* is what a client expects the server's certificate to name."""

    def __init__(self, context: ssl.SSLContext, *, server: bool, hostname: str | None = None) -> None:
        self._lock = threading.Lock()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object: Any = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server, server_hostname=hostname
        )
        if hasattr(context, "setup_psk_callbacks"):  # sslpsk3, which would do it at each step
            context.setup_psk_callbacks(self._object)
        self.established = False

    def feed(self, data: Buffer) -> None:
        """Take bytes that were received; none: the other end has hung up, with or without saying so."""
        with self._lock:
            if len(data):
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def handshake(self) -> bool:
        """Go on with the handshake as far as what was fed allows; tell whether it is done. Raises TlsFailed."""
        with self._lock:
            try:
                ssl.SSLObject.do_handshake(self._object)
            except ssl.SSLWantReadError:
                return False
            except (ssl.SSLError, OSError, ValueError) as error:
                raise TlsFailed(
                    f"TLS handshake failed: {_words(error)}", qemu=f"TLS handshake failed: {_words(error)}"
                ) from error
            self.established = True
            return True

    def outgoing(self) -> bytes:
        """Return what is to be sent now."""
        with self._lock:
            return self._outgoing.read()

    def encrypt(self, data: Buffer) -> bytes:
        """Return *data* (CHUNK at most) as it is sent, behind whatever else is to be sent."""
        with self._lock:
            self._object.write(data)
            return self._outgoing.read()

    def decrypt_into(self, view: memoryview) -> int | None:
        """Put what was decrypted to the beginning of *view*; return how much, 0 at the end, None where more has to be fed. Raises TlsFailed."""
        with self._lock:
            try:
                return int(self._object.read(len(view), view))
            except ssl.SSLWantReadError:
                return None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0  # many peers hang up without a word
            except (ssl.SSLError, OSError) as error:
                raise TlsFailed(f"the encrypted connection broke: {_words(error)}") from error

    def decrypt(self) -> bytes:
        """Return all that was decrypted so far."""
        out = bytearray()
        piece = bytearray(64 << 10)
        with memoryview(piece) as view:
            while count := self.decrypt_into(view):
                out += view[:count]
        return bytes(out)


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message or str(error)
    reason = getattr(error, "reason", None)
    return reason.lower().replace("_", " ") if isinstance(reason, str) else str(error)

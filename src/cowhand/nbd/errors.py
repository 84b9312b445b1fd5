"""Errors of an NBD conversation, by what the other side may do after them."""

from __future__ import annotations

import errno

from cowhand.core.errors import CowhandError, IOFailed


class ProtocolViolation(CowhandError):
    """The other side sent what the protocol does not allow: the connection is of no use any more, and another one is not tried."""

    code = "nbd-protocol"
    exit_code = 3
    default_errno = errno.EINVAL


class NegotiationRefused(CowhandError):
    """The server did not agree to what was asked: no such export, TLS wanted, an option denied."""

    code = "nbd-refused"
    exit_code = 3
    default_errno = errno.EINVAL


class ConnectionLost(IOFailed):
    """The connection ended, or could not be made; a new one may work."""

    code = "connection-lost"

"""What clients of a server may take: numbers, times and memory."""

from __future__ import annotations

from typing import NamedTuple

#: The smallest buffers with which a connection works, one to receive into and one for replies; and the largest.
LEAST_BUFFER = 256 << 10
BUFFER = (2 << 20) + 4096


class Limits(NamedTuple):
    """Limits of one server. ``clients`` is None where connections alone are limited; the rest wait in the listening socket's queue then."""

    clients: int | None = (
        None  #: at once, those included whose handshake goes on; further ones are not answered (QEMU's --shared)
    )
    connections: int = 512  #: past their handshake; further ones are closed
    handshakes: int = 256  #: going on at once; the oldest is ended for a further one
    handshake_seconds: float = 10.0
    memory: int = 256 << 20  #: bytes of buffers of all connections together, shared among them
    in_flight: int = 16  #: requests of one connection that are worked on at once, where they may wait

    def share(self, connections: int) -> int:
        """Return the bytes that one of *connections* may hold."""
        return max(2 * LEAST_BUFFER, self.memory // max(1, connections))


def buffer_size(share: int) -> int:
    """Return how large each of a connection's two buffers is, when it may hold *share* bytes."""
    return max(LEAST_BUFFER, min(BUFFER, share // 4))

"""What a server offers: an export as the handshake tells of it, and what both sides agree on in the end. No I/O.

Source: NetworkBlockDevice ``doc/proto.md``, "Option types", "Metadata querying".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cowhand.nbd.constants import FLAG_BLOCK_STATUS_PAYLOAD, FLAG_HAS_FLAGS, FLAG_SEND_DF, MAX_PAYLOAD


class Offer(NamedTuple):
    """An export. ``flags`` are transmission flags without those that depend on the client; ``contexts`` are names of metadata."""

    name: str
    size: int
    flags: int
    description: str = ""
    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD
    contexts: tuple[str, ...] = ()


class Catalogue(Protocol):
    """What exports a server has. Both calls are quick, and do no I/O."""

    def names(self) -> Sequence[tuple[str, str]]:
        """Return (name, description) of each export that a list shows."""
        ...

    def find(self, name: str) -> Offer | None:
        """Return the export *name*; the empty name means the default one."""
        ...


class Agreement(NamedTuple):
    """What a client and a server agreed on. ``contexts`` are the names of the chosen metadata; a context's id is its index."""

    offer: Offer
    structured: bool = False
    extended: bool = False
    contexts: tuple[str, ...] = ()

    @property
    def flags(self) -> int:
        """The transmission flags that the client is told."""
        return flags_for(self.offer, structured=self.structured, extended=self.extended)


def flags_for(offer: Offer, *, structured: bool, extended: bool) -> int:
    """Return the transmission flags of *offer* for a client that agreed to such replies."""
    flags = offer.flags | FLAG_HAS_FLAGS
    if structured:
        flags |= FLAG_SEND_DF
    if extended:
        flags |= FLAG_BLOCK_STATUS_PAYLOAD
    return flags

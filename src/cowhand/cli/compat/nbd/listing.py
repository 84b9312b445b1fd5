"""``-L``: what another server exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.block.protocols.nbd.address import HANDSHAKE_SECONDS, Dial, Server, TlsClient
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError
from cowhand.nbd import constants as nbd
from cowhand.nbd.listing import Listed, list_exports

if TYPE_CHECKING:
    from cowhand.cli.compat.nbd.settings import Settings

_FLAGS = (
    (nbd.FLAG_READ_ONLY, "readonly"),
    (nbd.FLAG_SEND_FLUSH, "flush"),
    (nbd.FLAG_SEND_FUA, "fua"),
    (nbd.FLAG_ROTATIONAL, "rotational"),
    (nbd.FLAG_SEND_TRIM, "trim"),
    (nbd.FLAG_SEND_WRITE_ZEROES, "zeroes"),
    (nbd.FLAG_SEND_DF, "df"),
    (nbd.FLAG_CAN_MULTI_CONN, "multi"),
    (nbd.FLAG_SEND_RESIZE, "resize"),
    (nbd.FLAG_SEND_CACHE, "cache"),
    (nbd.FLAG_SEND_FAST_ZERO, "fast-zero"),
    (nbd.FLAG_BLOCK_STATUS_PAYLOAD, "block-status-payload"),
)


def show_exports(settings: Settings) -> int:
    """Print the exports of the server that *settings* name. Raises Failure."""
    if settings.socket is not None:
        server = Server("unix", path=settings.socket)
    else:
        server = Server("inet", host=settings.host, port=settings.service)
    try:
        tls = None
        if settings.tls_creds is not None:
            from cowhand.crypto.tls import find

            tls = TlsClient(find(settings.tls_creds), settings.tls_hostname)
        exports = Dial(server, HANDSHAKE_SECONDS, tls).ask(list_exports(tls=tls is not None))
    except CowhandError as error:
        raise Failure(error.qemu()) from None
    print(f"exports available: {len(exports)}")
    for export in exports:
        _show(export)
    return 0


def _show(export: Listed) -> None:
    print(f" export: '{export.name}'")
    if export.description:
        print(f"  description: {export.description}")
    if export.size is None:
        return
    print(f"  size:  {export.size}")
    if export.flags & nbd.FLAG_HAS_FLAGS:
        names = "".join(f" {name}" for flag, name in _FLAGS if export.flags & flag)
        print(f"  flags: 0x{export.flags:x} ({names} )")
    if export.minimum:
        print(f"  min block: {export.minimum}")
        print(f"  opt block: {export.preferred}")
        print(f"  max block: {export.maximum}")
    if export.contexts:
        print(f"  available meta contexts: {len(export.contexts)}")
        for context in export.contexts:
            print(f"   {context}")

"""Names of exports: NBD URIs, and QEMU's older "nbd:..." names.

Sources: NetworkBlockDevice ``doc/uri.md``; QEMU ``docs/system/qemu-block-drivers``, "NBD access".
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cowhand.core.errors import InvalidArgument
from cowhand.nbd.constants import DEFAULT_PORT

_URI = re.compile(
    r"(?P<scheme>nbds?(?:\+(?:tcp|unix))?)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?"
)
#: What a query may say of TLS; "tls-certificates", "tls-psk-file" and "tls-verify-peer" are those of libnbd.
TLS_SETTINGS = ("tls-certificates", "tls-psk-file", "tls-hostname", "tls-verify-peer")
_AUTHORITY = re.compile(r"(?:(?P<user>[^@]*)@)?(?:\[(?P<six>[^\]]*)\]|(?P<host>[^:]*))(?::(?P<port>\d*))?\Z")


class Address(NamedTuple):
    """Where a server is and what of it is meant: a path of a socket, or a host and a port (as text; a name of a service too)."""

    path: str | None = None
    host: str | None = None
    port: str = str(DEFAULT_PORT)
    export: str | None = None
    tls: bool = False
    #: What the query says of TLS: (name, value), names of the options of the driver "nbd".
    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Return the name that QEMU prints of it."""
        export = f"/{self.export}" if self.export is not None else ""
        secure = "s" if self.tls else ""
        more = [f"{name}={value}" for name, value in self.settings]
        if self.path is not None:
            return f"nbd{secure}+unix://{export or '/' * self.tls}?" + "&".join([f"socket={self.path}", *more])
        return f"nbd{secure}://{self.host}:{self.port}{export}" + ("?" + "&".join(more) if more else "")


def parse(name: str) -> Address:
    """Return what *name* means. Raises InvalidArgument."""
    address = _parse_uri(name) if "://" in name else _parse_old(name)
    if any("\0" in part for part in address if isinstance(part, str)):
        # A socket's path that begins with one would be a name in Linux' abstract space.
        raise InvalidArgument("No valid URL specified", path=name, hint="A name cannot contain a zero byte.")
    return address


def _parse_old(name: str) -> Address:
    prefix, _, rest = name.partition(":")
    if prefix != "nbd":
        raise InvalidArgument("File name string for NBD must start with 'nbd:'", path=name)
    rest, found, export = rest.partition(":exportname=")
    if not rest or (found and not export):
        raise InvalidArgument("NBD server address missing", path=name)
    if rest.startswith("unix:"):
        return Address(path=rest[5:], export=export if found else None)
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%]+)\]|([^:]*)):([^,:]+)(?:,.*)?", rest)
    if match is None:
        raise InvalidArgument(f"error parsing address '{rest}'", path=name)
    return Address(host=match[1] or match[2], port=match[3], export=export if found else None)


def _parse_uri(name: str) -> Address:
    from urllib.parse import parse_qsl, unquote

    match = _URI.fullmatch(name.partition("#")[0])
    authority = _AUTHORITY.match(match["authority"]) if match is not None else None
    if match is None or authority is None:
        raise InvalidArgument("No valid URL specified", path=name)
    scheme = match["scheme"]
    tls = scheme.startswith("nbds")
    # One slash parts the export from the server; further ones are its own.
    export = unquote(match["path"].removeprefix("/"), errors="surrogateescape") or None
    query = parse_qsl(match["query"] or "", keep_blank_values=True, errors="surrogateescape")
    user = authority["user"]
    settings = tuple(pair for pair in query if tls and pair[0] in TLS_SETTINGS)
    query = [pair for pair in query if pair not in settings]
    if tls and user:
        settings += (("tls-username", unquote(user)),)
    host = authority["six"] or unquote(authority["host"] or "")
    if scheme.endswith("+unix"):
        if host or authority["port"] or len(query) != 1 or query[0][0] != "socket":
            raise InvalidArgument(
                "No valid URL specified", path=name, hint="A Unix socket is nbd+unix:///EXPORT?socket=PATH."
            )
        return Address(path=query[0][1], export=export, tls=tls, settings=settings)
    if not host or query:
        raise InvalidArgument("No valid URL specified", path=name, hint="A server is nbd://HOST:PORT/EXPORT.")
    port = authority["port"] or str(DEFAULT_PORT)
    return Address(host=host, port=port, export=export, tls=tls, settings=settings)

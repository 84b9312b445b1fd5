"""Options of the driver "nbd": what they are, and the server that they mean.

Source: QEMU ``BlockdevOptionsNbd`` (``qapi/block-core.json``), ``SocketAddress`` (``qapi/sockets.json``).
"""

from __future__ import annotations

import socket
from typing import Any

from cowhand.block.node.options import NodeOptions, option, parse
from cowhand.block.protocols.nbd.address import Server, TlsClient
from cowhand.core.errors import InvalidArgument
from cowhand.nbd import uri
from cowhand.nbd.constants import DEFAULT_PORT
from cowhand.nbd.options import encode_string


class NbdOptions(NodeOptions):
    """Options of "nbd". Texts that QEMU takes as numbers too (JSON) are of the kind "any"."""

    filename: str | None = option(
        help="nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH, or nbd:HOST:PORT:exportname=NAME", strong=False
    )
    server_type: str | None = option(
        name="server.type", choices=("inet", "unix", "vsock", "fd"), help="how the server is reached"
    )
    server_path: Any = option(name="server.path", kind="any", help="unix: the socket")
    server_abstract: bool = option(
        False, name="server.abstract", kind="bool", help="unix: a name in Linux' abstract space"
    )
    server_tight: bool = option(True, name="server.tight", kind="bool", help="unix, abstract: only 'on' is supported")
    server_host: Any = option(name="server.host", kind="any", help="inet: name or address")
    server_port: Any = option(
        name="server.port", kind="any", help="inet and vsock: port, or for inet the name of a service"
    )
    server_ipv4: bool | None = option(name="server.ipv4", kind="bool", help="inet: whether IPv4 is used")
    server_ipv6: bool | None = option(name="server.ipv6", kind="bool", help="inet: whether IPv6 is used")
    server_numeric: bool = option(False, name="server.numeric", kind="bool", help="inet: accepted")
    server_keep_alive: bool = option(
        True, name="server.keep-alive", kind="bool", help="inet: accepted; probes are always sent", strong=False
    )
    server_cid: Any = option(name="server.cid", kind="any", help="vsock: context identifier of the peer")
    server_str: Any = option(
        name="server.str", kind="any", help="fd: number of an open descriptor, which is not taken over"
    )
    path: Any = option(kind="any", help="the same as server.path")
    host: Any = option(kind="any", help="the same as server.host")
    port: Any = option(kind="any", help=f"the same as server.port ({DEFAULT_PORT} unless given)")
    export: str | None = option(help="name of the export; unless given, the server's default one")
    tls_creds: str | None = option(help="id of TLS credentials: all is encrypted")
    tls_hostname: str | None = option(help="name that the server's certificate must have; unless given, the host's")
    tls_certificates: str | None = option(
        help="folder with ca-cert.pem, and perhaps client-cert.pem and client-key.pem: all is encrypted"
    )
    tls_psk_file: str | None = option(help="file of pre-shared keys: all is encrypted")
    tls_username: str | None = option(help="user whose key of tls-psk-file is taken; 'qemu' unless given")
    tls_system: bool = option(False, kind="bool", help="encrypt, and trust the server's certificate if the system does")
    tls_verify_peer: bool = option(
        True, kind="bool", help="whether the server's certificate is verified (tls-certificates)"
    )
    x_dirty_bitmap: str | None = option(
        help='metadata context to show instead of "base:allocation", such as "qemu:dirty-bitmap:NAME"', strong=False
    )
    reconnect_delay: int = option(
        0, kind="int", help="seconds for which requests wait for a new connection when it is lost", strong=False
    )
    open_timeout: int = option(
        0, kind="int", help="seconds for which connecting is tried when it is opened", strong=False
    )
    reply_timeout: int = option(
        120,
        kind="int",
        help="seconds without a reply after which the server counts as lost; 0: never",
        strong=False,
    )
    connections: int = option(4, kind="int", help="connections at most, to servers that allow several", strong=False)


_TEXTS = ("path", "host", "port", "cid", "str")
_NEEDED = {"unix": ("path",), "inet": ("host", "port"), "vsock": ("cid", "port"), "fd": ("str",)}
_LEGACY = ("path", "host", "port", "export")


def with_server(options: NbdOptions, server: Any) -> NbdOptions:
    """Return *options* with those of the nested description *server*."""
    if not isinstance(server, dict):
        raise InvalidArgument("Parameter 'server' expects a description of an address")
    if any(getattr(options, name) is not None for name in ("path", "host", "port")):
        raise InvalidArgument("Cannot use 'server' and path/host/port at the same time")
    below = parse(NbdOptions, {"server": server}, driver="nbd", kind="protocol")
    return NbdOptions(**{**vars(options), **vars(below)})


def _text(name: str, value: Any) -> str | None:
    """Return an option's value as the text that QEMU makes of it."""
    if value is None or isinstance(value, str):
        text: str | None = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        text = str(value)
    else:
        raise InvalidArgument(f"Parameter '{name}' expects a string")
    if text is not None and "\0" in text:
        raise InvalidArgument(f"Parameter '{name}' cannot contain a zero byte")
    return text


def address_of(options: NbdOptions) -> uri.Address:
    """Return the address by which *options* would be printed. Raises InvalidArgument for what contradicts itself."""
    _check(options)
    if options.filename is not None:
        for name in (*_LEGACY, "server_type"):
            if getattr(options, name) is not None:
                shown = name.replace("_", ".")
                raise InvalidArgument(f"Option '{shown}' cannot be used with a file name")
        address = uri.parse(options.filename)
    elif options.server_type is not None:
        address = uri.Address(
            path=_text("server.path", options.server_path),
            host=_text("server.host", options.server_host),
            port=_text("server.port", options.server_port) or "",
            export=options.export,
        )
    else:
        address = _legacy(options)
    encode_string(address.export or "", "export name")
    return address


def _check(options: NbdOptions) -> None:
    ways = [options.tls_creds, options.tls_certificates, options.tls_psk_file, options.tls_system or None]
    if len([way for way in ways if way is not None]) > 1:
        raise InvalidArgument(
            "TLS has one kind of credentials: tls-creds, tls-certificates, tls-psk-file or tls-system"
        )
    if ways == [None] * 4 and options.tls_hostname is not None:
        raise InvalidArgument("TLS hostname is only used with TLS credentials")
    for name in ("reconnect_delay", "open_timeout", "reply_timeout"):
        if not 0 <= getattr(options, name) < 1 << 31:
            raise InvalidArgument(f"Parameter '{name.replace('_', '-')}' expects seconds, 0 to {(1 << 31) - 1}")
    if not 1 <= options.connections <= 16:
        raise InvalidArgument("Parameter 'connections' expects a number from 1 to 16")
    encode_string(options.x_dirty_bitmap or "", "x-dirty-bitmap query")


def _legacy(options: NbdOptions) -> uri.Address:
    path, host, port = (_text(name, getattr(options, name)) for name in ("path", "host", "port"))
    if path is not None and host is not None:
        raise InvalidArgument("path and host may not be used at the same time")
    if path is not None:
        if port is not None:
            raise InvalidArgument("port may not be used without host")
        return uri.Address(path=path, export=options.export)
    if host is None:
        raise InvalidArgument("NBD server address missing")
    return uri.Address(host=host, port=port or str(DEFAULT_PORT), export=options.export)


def with_uri(options: NbdOptions) -> NbdOptions:
    """Return *options* with what a URI says of TLS. Raises InvalidArgument."""
    if options.filename is None:
        return options
    address = uri.parse(options.filename)
    if not address.tls:
        return options
    given = parse(NbdOptions, dict(address.settings), driver="nbd", kind="protocol")
    merged = NbdOptions(**{**vars(options), **vars(given)})
    named = (merged.tls_creds, merged.tls_certificates, merged.tls_psk_file)
    return NbdOptions(**{**vars(merged), "tls_system": True}) if named == (None,) * 3 else merged


def tls_of(options: NbdOptions) -> TlsClient | None:
    """Return how *options* have the connection encrypted, or None. Raises InvalidArgument."""
    from cowhand.crypto import tls

    if options.tls_creds is not None:
        credentials: tls.Credentials = tls.find(options.tls_creds)
    elif options.tls_certificates is not None:
        credentials = tls.X509(options.tls_certificates, options.tls_verify_peer)
    elif options.tls_psk_file is not None:
        credentials = tls.PresharedKeys(options.tls_psk_file, options.tls_username or tls.DEFAULT_USER)
    elif options.tls_system:
        credentials = tls.SystemAuthorities()
    else:
        return None
    return TlsClient(credentials, options.tls_hostname)


def server_of(options: NbdOptions) -> Server:
    """Return where *options* say that the server is."""
    kind = options.server_type
    if kind is None:
        address = address_of(options)
        if address.path is not None:
            return Server("unix", path=address.path)
        return Server("inet", host=address.host or "", port=address.port)
    texts = {name: _text(f"server.{name}", getattr(options, f"server_{name}")) for name in _TEXTS}
    for name in _NEEDED[kind]:
        if texts[name] is None:
            raise InvalidArgument(f"Parameter 'server.{name}' is missing")
    if kind == "unix":
        if options.server_abstract and not options.server_tight:
            raise InvalidArgument("Parameter 'server.tight' can only be 'on'")
        return Server(kind, path=texts["path"] or "", abstract=options.server_abstract)
    if kind == "fd":
        return Server(kind, path=texts["str"] or "")
    if kind == "vsock":
        for name in ("cid", "port"):
            text = texts[name] or ""
            if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) >= 1 << 32:
                raise InvalidArgument(f"Parameter 'server.{name}' expects a number below 2^32")
        return Server(kind, host=texts["cid"] or "", port=texts["port"] or "")
    return Server(kind, host=texts["host"] or "", port=texts["port"] or "", family=_family(options))


def _family(options: NbdOptions) -> int:
    four, six = options.server_ipv4, options.server_ipv6
    if four is False and six is False:
        raise InvalidArgument("Cannot disable IPv4 and IPv6 at same time")
    if (four and not six) or six is False:
        return socket.AF_INET
    if (six and not four) or four is False:
        return socket.AF_INET6
    return socket.AF_UNSPEC

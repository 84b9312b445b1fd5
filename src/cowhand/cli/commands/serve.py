"""Serve images to other programs and machines over NBD, read-only unless --writable is given.

Each image is an export with its file's name; the first line that is printed for one is how to reach it. Connections are reported. The
server ends with Ctrl-C, after it has answered what it was asked. Without --listen it is reached from this machine only, by TCP.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import cowhand
from cowhand.cli import arguments
from cowhand.core.errors import InvalidArgument
from cowhand.core.units import format_size
from cowhand.exports.nbd.server import Observer
from cowhand.exports.nbd.workers import Workers, inherited_sockets, when_the_parent_ends
from cowhand.nbd.constants import COMMAND_NAMES, DEFAULT_PORT

if TYPE_CHECKING:
    import socket
    import ssl

    from cowhand.block.disk import Disk
    from cowhand.cli.running import Context
    from cowhand.exports.nbd.connection import Connection
    from cowhand.exports.nbd.server import NbdServer

EXAMPLES = """\
  cowhand serve disk.qcow2                       for programs of this machine, by TCP
  cowhand serve -l /run/user/1000/d.sock *.raw   on a Unix socket, several images
  cowhand serve -l :10809 --writable disk.qcow2  for everybody who reaches this machine
  cowhand serve --snapshot monday disk.qcow2     as it was when that snapshot was made
  qemu-img convert nbd://localhost/disk.qcow2 copy.raw
"""


MAX_PROCESSES = 64


def writes(args: argparse.Namespace) -> bool:
    """Tell that the first signal lets the command come to its own end."""
    return True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="images to export")
    arguments.add_format(parser, "the images")
    parser.add_argument(
        "-l",
        "--listen",
        action="append",
        metavar="ADDRESS",
        help=f"PATH of a Unix socket, HOST:PORT, :PORT (all addresses of this machine) or vsock:PORT; repeatable "
        f"(default: localhost:{DEFAULT_PORT})",
    )
    parser.add_argument("-w", "--writable", action="store_true", help="let clients write")
    parser.add_argument("--name", help="name of the export, where there is one image (default: the file's name)")
    parser.add_argument("--snapshot", metavar="NAME", help="export a snapshot inside of the image, for reading only")
    parser.add_argument(
        "--bitmap",
        action="append",
        default=[],
        metavar="NAME",
        help="let clients see the dirty bitmap NAME; repeatable",
    )
    parser.add_argument("--allocation-depth", action="store_true", help="let clients see which layer holds what")
    parser.add_argument("--once", action="store_true", help="end when the last client has left")
    parser.add_argument(
        "--clients", type=int, metavar="NUMBER", help="serve so many at once; further ones wait (default: hundreds)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="NUMBER",
        help="serve with so many processes, for several busy connections; for reading only",
    )
    parser.add_argument(
        "--cache",
        choices=arguments.CACHE_NAMES,
        default="writeback",
        metavar="MODE",
        help=f"cache mode: {', '.join(arguments.CACHE_NAMES)}",
    )
    tls = parser.add_argument_group("TLS")
    tls.add_argument(
        "--tls-certificates",
        metavar="FOLDER",
        help="encrypt all: FOLDER has ca-cert.pem, server-cert.pem and server-key.pem, as for qemu-nbd",
    )
    tls.add_argument(
        "--tls-verify-peer", action="store_true", help="serve clients only that have a certificate of that authority"
    )
    tls.add_argument(
        "--tls-psk", metavar="FILE", help="encrypt all with the pre-shared keys in FILE, lines of USER:KEY"
    )
    arguments.add_share(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")
    parser.add_argument(
        "--force", action="store_true", help="write although the system uses the image (a mounted device)"
    )
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Serve until a signal comes, or, with --once, until the last client has left."""
    from cowhand.exports.nbd.export import NbdExport
    from cowhand.exports.nbd.limits import Limits
    from cowhand.exports.nbd.server import NbdServer

    _check(args)
    inherited = inherited_sockets()
    with ExitStack() as stack:
        exports = []
        for image, name in zip(args.image, _names(args), strict=True):
            disk = _open(args, image, stack)
            exports.append(
                NbdExport(
                    disk,
                    name,
                    description=f"{image} ({disk.format})",
                    writable=args.writable,
                    allocation_depth=args.allocation_depth,
                    bitmaps=args.bitmap,
                )
            )
        watch = _Watch(context)
        server = NbdServer(
            exports,
            tls=_tls(args),
            limits=Limits(clients=args.clients),
            shares_sockets=args.processes > 1,
            observer=watch,
        )
        listening = inherited or _listen(args, stack)
        server.listen(*listening)
        if inherited:
            when_the_parent_ends(context.cancel.cancel)
        elif args.processes > 1:
            stack.callback(Workers(args.processes - 1, _words(args), listening).stop)
        server.start()
        try:
            if not inherited:
                _announce(server, listening, context)
            while not context.cancel.wait(0.2) and not (args.once and watch.done):
                pass
        finally:
            server.stop()
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.writable and args.snapshot is not None:
        raise arguments.Usage("a snapshot cannot be written: leave out --writable")
    if args.name is not None and len(args.image) > 1:
        raise arguments.Usage("--name is for one image")
    if args.clients is not None and args.clients < 1:
        raise arguments.Usage("--clients is at least 1")
    if not 1 <= args.processes <= MAX_PROCESSES:
        raise arguments.Usage(f"--processes is 1 to {MAX_PROCESSES}")
    if args.processes > 1:
        for given, option in (
            (args.writable, "--writable"),
            (args.once, "--once"),
            (args.clients, "--clients"),
            (args.secret or args.key_file, "passphrases"),
        ):
            if given:
                raise arguments.Usage(f"--processes does not go with {option}")


def _words(args: argparse.Namespace) -> list[str]:
    """Return the command line of a further process."""
    words = ["serve", f"--processes={args.processes}", f"--cache={args.cache}"]
    for name in ("format", "name", "snapshot", "tls_certificates", "tls_psk"):
        if getattr(args, name) is not None:
            words.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    for name in ("allocation_depth", "force_share", "quiet", "tls_verify_peer"):
        if getattr(args, name):
            words.append(f"--{name.replace('_', '-')}")
    words += [f"--bitmap={name}" for name in args.bitmap]
    return [*words, "--output=json" if args.output == "json" else "--output=text", "--", *args.image]


def _tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    if args.tls_verify_peer and args.tls_certificates is None:
        raise arguments.Usage("--tls-verify-peer needs --tls-certificates")
    if args.tls_certificates is None and args.tls_psk is None:
        return None
    from cowhand.crypto import tls

    if args.tls_psk is None:
        return tls.X509(args.tls_certificates, args.tls_verify_peer).server()
    if args.tls_certificates is not None:
        raise arguments.Usage("--tls-certificates and --tls-psk exclude each other")
    return tls.PresharedKeys(args.tls_psk).server()


def _names(args: argparse.Namespace) -> list[str]:
    if args.name is not None:
        return [args.name]
    names = [os.path.basename(image) or image for image in args.image]
    # Files of one name in several folders go by their paths.
    return [image if names.count(name) > 1 else name for image, name in zip(args.image, names, strict=True)]


def _open(args: argparse.Namespace, image: str, stack: ExitStack) -> Disk:
    disk = stack.enter_context(
        cowhand.open(
            image,
            format=args.format,
            writable=args.writable,
            cache=args.cache,
            force_share=args.force_share,
            resizable=False,
            options={"discard": "unmap"} if args.writable else None,
        )
    )
    return disk if args.snapshot is None else stack.enter_context(cowhand.open_snapshot(disk, args.snapshot))


# -- addresses


def _listen(args: argparse.Namespace, stack: ExitStack) -> list[socket.socket]:
    from cowhand.exports.nbd import sockets

    addresses = args.listen or [f"localhost:{DEFAULT_PORT}"]
    activated = sockets.activated()
    if activated:
        return activated
    found: list[socket.socket] = []
    for address in addresses:
        if "/" in address or not address.rpartition(":")[1]:
            if address.isdecimal():
                raise InvalidArgument(
                    f"'{address}' is not an address", hint=f"A port of this machine is localhost:{address}."
                )
            path = os.path.abspath(address)
            found.append(sockets.listen_unix(path))
            stack.callback(_remove, path)
            continue
        host, _, port = address.rpartition(":")
        if host == "vsock":
            found.append(sockets.listen_vsock(_port(port)))
        else:
            found.extend(sockets.listen_tcp(host.strip("[]"), _port(port)))
    return found


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 1 << 32):
        raise InvalidArgument(
            f"'{text}' is not a port", hint="An address is HOST:PORT, :PORT, vsock:PORT or the path of a Unix socket."
        )
    return int(text)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _uri(sock: socket.socket, name: str, tls: bool) -> str:
    """Return the URI of the export *name* at *sock*."""
    import socket
    from urllib.parse import quote

    address = sock.getsockname()
    scheme = "nbds" if tls else "nbd"
    export = quote(name, safe="/")
    if sock.family == socket.AF_UNIX:
        return f"{scheme}+unix:///{export}?socket={quote(os.fsdecode(address), safe='/')}"
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return f"{scheme}+vsock://{address[0]}:{address[1]}/{export}"
    host, port = address[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    elif host in ("127.0.0.1", "::1"):
        host = "localhost"
    elif ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}/{export}" if port == DEFAULT_PORT else f"{scheme}://{host}:{port}/{export}"


# -- what is told


def _announce(server: NbdServer, listening: list[socket.socket], context: Context) -> None:
    out = context.out
    rows: list[dict[str, Any]] = []
    for export in server.exports:
        uris = list(dict.fromkeys(_uri(sock, export.name, server.encrypts) for sock in listening))
        mode = "writable" if export.writable else "read-only"
        out.line(f"{export.name}: {export.offer.description}, {format_size(export.offer.size)}, {mode}")
        for uri in uris:
            out.line(f"  {uri}")
        rows.append({"name": export.name, "size": export.offer.size, "writable": export.writable, "uris": uris})
    if out.json:
        out.document({"exports": rows})
    elif rows:
        out.line(f"For example: qemu-img info '{rows[0]['uris'][0]}'. Ctrl-C ends the server.")
    out.flush()


class _Watch(Observer):
    """Tells of clients, from the server's threads: an :class:`cowhand.exports.nbd.server.Observer`."""

    def __init__(self, context: Context) -> None:
        self._out = context.out
        self.done = False

    def client_began(self, connection: Connection) -> None:
        self._tell(connection.name, connection.export.name, "connected")

    def client_left(self, connection: Connection, remaining: int) -> None:
        did = [
            f"{format_size(nbytes) + ' in ' if nbytes else ''}{count} {COMMAND_NAMES[command]} request{'s' if count > 1 else ''}"
            for command, (count, nbytes) in connection.statistics.totals.items()
            if count
        ]
        if connection.statistics.errors:
            did.append(f"{connection.statistics.errors} failed")
        reason = f" ({connection.reason})" if connection.reason else ""
        self._tell(connection.name, connection.export.name, f"left{reason}: {', '.join(did) or 'nothing asked'}")
        if not remaining:
            self.done = True

    def client_refused(self, name: str, reason: str) -> None:
        self._tell(name, "", reason)

    def _tell(self, name: str, export: str, what: str) -> None:
        self._out.line(f"{name}{': ' + export if export else ''}: {what}")
        self._out.flush()

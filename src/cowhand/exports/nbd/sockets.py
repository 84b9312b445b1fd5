"""Sockets that a server listens on: made, found in the environment, named.

Sources: unix(7), tcp(7), vsock(7); systemd ``sd_listen_fds(3)`` for those that were opened before the process began.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct

from cowhand.core.errors import InvalidArgument, IOFailed, from_os_error

#: Connections that may wait in the kernel until they are accepted.
BACKLOG = 128
#: The first descriptor of a process that was started with sockets (SD_LISTEN_FDS_START).
FIRST_ACTIVATED = 3
_UNIX_PATH = 107  #: bytes, of sockaddr_un


def listen_unix(path: str, *, replace: bool = False, backlog: int = BACKLOG) -> socket.socket:
    """Listen on a socket at *path*. One that nobody listens on any more is replaced; any one where *replace* says so. Raises CowhandError."""
    name = os.fsencode(path)
    if len(name) > _UNIX_PATH:
        raise InvalidArgument(
            f"a socket's path has at most {_UNIX_PATH} bytes: '{path}'",
            qemu=f"UNIX socket path '{path}' is too long\nPath must be less than {_UNIX_PATH + 1} bytes",
        )
    if not name.startswith(b"\0") and _is_socket(path) and (replace or not _answers(path)):
        with contextlib.suppress(OSError):
            os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    return _listening(sock, name, path, backlog)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def listen_tcp(
    host: str, port: str | int, *, family: int = socket.AF_UNSPEC, backlog: int = BACKLOG
) -> list[socket.socket]:
    """Listen on all addresses that *host* (empty: all of this machine) and *port* mean. Raises CowhandError; nothing stays open then."""
    shown = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host or None, port, family, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise IOFailed(f"address resolution failed for {shown}: {reason}", errno=errno.EADDRNOTAVAIL) from error
    sockets: list[socket.socket] = []
    try:
        for kind, _, _, _, address in sorted(found, key=lambda each: each[0] != socket.AF_INET6):
            try:
                sock = socket.socket(kind, socket.SOCK_STREAM)
            except OSError:
                continue  # a machine without IPv6
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if str(port) == "0" and sockets:  # any port: the same one for all
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sockets.append(_listening(sock, address, shown, backlog))
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    if not sockets:
        raise IOFailed(f"nothing to listen on at {shown}", errno=errno.EADDRNOTAVAIL)
    return sockets


def listen_vsock(port: int, cid: int | None = None, *, backlog: int = BACKLOG) -> socket.socket:
    """Listen on a port for virtual machines of this host, or, inside of one, for its host. Raises CowhandError."""
    if not hasattr(socket, "AF_VSOCK"):
        raise InvalidArgument("this system has no vsock sockets")
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise from_os_error(error, "vsock", doing="making a socket") from error
    return _listening(sock, (socket.VMADDR_CID_ANY if cid is None else cid, port), f"vsock port {port}", backlog)


def _listening(sock: socket.socket, address: object, shown: str, backlog: int) -> socket.socket:
    try:
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(backlog)
    except (OSError, ValueError, OverflowError) as error:
        sock.close()
        number = getattr(error, "errno", None) or errno.EINVAL
        text = os.strerror(number)
        hint = "Another server listens there." if number == errno.EADDRINUSE else None
        raise IOFailed(
            f"cannot listen on {shown}: {text}",
            qemu=f"Failed to bind socket{f' to {shown}' if sock.family == socket.AF_UNIX else ''}: {text}",
            errno=number,
            path=shown,
            hint=hint,
        ) from error
    return sock


def activated(environment: dict[str, str] | None = None) -> list[socket.socket]:
    """Return the listening sockets that the process was started with, and forget them in its environment; none where it was not.

    Raises InvalidArgument for what is no socket.
    """
    variables = os.environ if environment is None else environment
    pid, count = variables.get("LISTEN_PID", ""), variables.get("LISTEN_FDS", "")
    if not (pid.isdecimal() and count.isdecimal() and int(pid) == os.getpid()):
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        variables.pop(name, None)
    sockets = []
    for number in range(FIRST_ACTIVATED, FIRST_ACTIVATED + int(count)):
        try:
            os.set_inheritable(number, False)
            sockets.append(socket.socket(fileno=number))
        except OSError as error:
            raise InvalidArgument(
                f"descriptor {number}, which the process was started with, is no socket: {error.strerror}"
            ) from None
    return sockets


def peer_name(sock: socket.socket, address: object) -> str:
    """Return how people call the other end of *sock*."""
    if sock.family == socket.AF_UNIX:
        try:
            pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except (OSError, AttributeError):
            return "local client"
        return f"pid {pid} (user {uid})"
    if sock.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
        return f"[{address[0]}]:{address[1]}" if sock.family == socket.AF_INET6 else f"{address[0]}:{address[1]}"
    return f"vsock {address[0]}:{address[1]}" if isinstance(address, tuple) else "client"


def tune(sock: socket.socket) -> None:
    """Send small replies at once, and notice a peer whose machine is gone."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

"""Serving an image as qemu-nbd does: socket first, then the image; in the background where asked; until the last client or a signal."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cowhand.cli.compat import program
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cowhand.block.disk import Disk
    from cowhand.cli.compat.nbd.device import Device
    from cowhand.cli.compat.nbd.settings import Settings
    from cowhand.cli.running import Mailbox
    from cowhand.exports.nbd.connection import Connection
    from cowhand.exports.nbd.export import NbdExport
    from cowhand.exports.nbd.server import Observer

#: Seconds that clients get for what they asked before the end.
GRACE = 5.0


def serve(settings: Settings) -> int:
    """Serve what *settings* say, and return the exit status. Raises Failure."""
    from cowhand.exports.nbd import sockets

    try:
        activated = sockets.activated()
    except CowhandError as error:
        raise Failure(error.qemu()) from None
    if activated:
        settings.check_activated()
        if len(activated) > 1:
            raise Failure(f"{program.name()} does not support socket activation with LISTEN_FDS > 1")
    if settings.fork or (settings.device is not None and not settings.verbose):
        return _in_background(settings, activated)
    return _serve(settings, activated, lambda: None)


# -- in the background


def _in_background(settings: Settings, activated: list[socket.socket]) -> int:
    """Fork: the child serves; the parent prints what the child says until it does, and fails if it said anything."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os.close(writing)
        said = False
        while piece := os.read(reading, 4096):
            said = True
            os.write(2, piece)
        return 1 if said else 0
    os.close(reading)
    os.setsid()
    before = os.dup(2)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(writing, 2)
    for descriptor in (nothing, writing):
        os.close(descriptor)

    def ready() -> None:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)

    status = 1
    try:
        status = _serve(settings, activated, ready)
    except Failure as failure:
        if failure.message is not None:
            program.error(failure.message, failure.hint)
        status = failure.status
    except CowhandError as error:
        program.error(error.qemu())
    finally:
        sys.stderr.flush()
        os._exit(status)


# -- the server


def _serve(settings: Settings, activated: list[socket.socket], ready: Callable[[], None]) -> int:
    from cowhand.cli.compat.nbd.image import open_exported
    from cowhand.cli.running import Mailbox
    from cowhand.exports.nbd.limits import Limits
    from cowhand.exports.nbd.server import NbdServer

    with ExitStack() as stack, Mailbox() as mailbox:
        try:
            listening = activated or _listen(settings)
        except CowhandError as error:
            raise Failure(error.qemu()) from None
        for sock in listening:
            stack.callback(sock.close)
        disk = open_exported(settings, stack)
        export = _export(settings, disk)
        seconds = 10 if settings.handshake_limit is None else settings.handshake_limit
        limits = Limits(clients=settings.shared or None, handshake_seconds=seconds)
        watch = _watch(settings, mailbox)
        server = NbdServer([export], default=False, tls=settings.tls, limits=limits, observer=watch)
        server.listen(*listening)
        if settings.pid_file is not None:
            _write_pid(settings.pid_file)
        with contextlib.suppress(OSError):
            os.chdir("/")
        server.start()
        try:
            device = _attach(settings, mailbox)
            ready()
            try:
                mailbox.get(None)
            finally:
                if device is not None:
                    device.close()
        finally:
            server.stop(GRACE)
            if not activated:
                _remove_socket(settings)
    return 0


def _listen(settings: Settings) -> list[socket.socket]:
    from cowhand.exports.nbd import sockets

    path = _socket_path(settings)
    backlog = min(settings.shared or 128, 128)
    if settings.selinux is not None:
        _label_sockets(settings.selinux)
    if path is not None:
        return [sockets.listen_unix(path, replace=True, backlog=backlog)]
    return sockets.listen_tcp(settings.host, settings.service, backlog=backlog)


def _socket_path(settings: Settings) -> str | None:
    if settings.socket is None and settings.device is not None:
        return f"/var/lock/qemu-nbd-{os.path.basename(settings.device)}"
    return settings.socket


def _label_sockets(label: str) -> None:
    """Have sockets that this thread makes carry an SELinux label."""
    try:
        with open("/proc/thread-self/attr/sockcreate", "wb") as file:
            file.write(label.encode())
    except OSError as error:
        raise Failure(f"Cannot set SELinux socket create context to {label}: {error.strerror}") from None


def _remove_socket(settings: Settings) -> None:
    path = _socket_path(settings)
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _write_pid(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    except OSError as error:
        raise Failure(f"Could not create '{path}': {error.strerror}") from None
    os.close(descriptor)


def _export(settings: Settings, disk: Disk) -> NbdExport:
    from cowhand.core.errors import BitmapNotFound
    from cowhand.exports.nbd.export import NbdExport

    for name in settings.bitmaps:
        try:
            NbdExport(disk, bitmaps=[name])
        except BitmapNotFound:
            raise Failure(f"Bitmap '{name}' is not found") from None
        except CowhandError as error:
            raise Failure(error.qemu()) from None
    return NbdExport(
        disk,
        settings.export or "",
        description=settings.description or "",
        writable=not disk.read_only,
        allocation_depth=settings.depth,
        bitmaps=list(dict.fromkeys(settings.bitmaps)),
        multi_conn=settings.shared != 1,
    )


def _watch(settings: Settings, mailbox: Mailbox) -> Observer:
    from cowhand.exports.nbd.server import Observer

    class Watch(Observer):
        """Ends the server with its last client, unless it is persistent; a client that never had an export does not count."""

        def client_left(self, connection: Connection, remaining: int) -> None:
            if not remaining and not settings.persistent:
                mailbox.put(0)

    return Watch()


def _attach(settings: Settings, mailbox: Mailbox) -> Device | None:
    """Give the export to a device of the kernel, where that is asked for."""
    if settings.device is None:
        return None
    from cowhand.cli.compat.nbd.device import Device

    path = _socket_path(settings)
    assert path is not None
    device = Device(settings.device, lambda: mailbox.put(0))
    device.attach(path, settings.export or "")
    if settings.verbose:
        print(f"NBD device {settings.device} is now connected to {settings.image}", flush=True)
    return device

"""Building the daemon from its options, in their order, and serving until a signal or ``quit``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any

from cowhand.block.node.options import nest
from cowhand.cli.compat.optionstrings import parse
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.daemon.commands.exports import start_server
from cowhand.daemon.daemon import Daemon
from cowhand.daemon.server import MonitorSocket, StdioMonitor
from cowhand.daemon.types import STRUCTS, check_arguments
from cowhand.exports.nbd import sockets

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FLAGS = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}


class _Setup:
    """What the options have made so far."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.chardevs: dict[str, dict[str, Any]] = {}
        self.monitors: list[MonitorSocket | StdioMonitor] = []
        self.socket_paths: list[str] = []

    def do(self, key: str, value: str) -> None:
        """Do one option. Raises CowhandError."""
        match key:
            case "blockdev":
                self.daemon.execute("blockdev-add", _keyval(value, "driver"))
            case "object":
                self.daemon.execute("object-add", _object(value))
            case "nbd-server":
                given = _keyval(value, None)
                address = check_arguments(STRUCTS["SocketAddress"], given.pop("addr", {}), "addr.")
                most = given.pop("max-connections", None)
                start_server(
                    self.daemon,
                    address,
                    given.pop("tls-creds", None),
                    given.pop("tls-authz", None),
                    int(most) if most else None,
                )
            case "export":
                self.daemon.execute("block-export-add", _export(_keyval(value, "type")))
            case "chardev":
                given = _keyval(value, "backend")
                if "id" not in given:
                    raise InvalidArgument("Parameter 'id' is missing")
                self.chardevs[given["id"]] = given
            case "monitor":
                self._monitor(_keyval(value, "chardev"))

    def _monitor(self, given: dict[str, Any]) -> None:
        chardev = self.chardevs.get(str(given.get("chardev")))
        if chardev is None:
            raise InvalidArgument(f'chardev "{given.get("chardev")}" not found')
        pretty = _flag(given.get("pretty", "off"))
        if chardev.get("backend") == "stdio":
            monitor: MonitorSocket | StdioMonitor = StdioMonitor(self.daemon, pretty=pretty)
        elif chardev.get("backend") == "socket":
            monitor = MonitorSocket(self.daemon, self._listen(chardev), pretty=pretty)
        else:
            raise InvalidArgument(f"'{chardev.get('backend')}' is not a valid char driver name here: socket, stdio")
        monitor.start()
        self.monitors.append(monitor)

    def _listen(self, chardev: dict[str, Any]) -> socket.socket:
        if "path" in chardev:
            self.socket_paths.append(chardev["path"])
            return sockets.listen_unix(chardev["path"], replace=True)
        if "fd" in chardev:
            return socket.socket(fileno=int(chardev["fd"]))
        found = sockets.listen_tcp(chardev.get("host", "localhost"), chardev.get("port", 0))
        for extra in found[1:]:
            extra.close()
        return found[0]


def serve(steps: Sequence[tuple[str, str]]) -> int:
    """Do the options *steps*, then serve. Returns the exit status."""
    if any(key == "daemonize" for key, _ in steps):
        return _daemonized(steps)
    return _serve(steps, lambda: None)


def _serve(steps: Sequence[tuple[str, str]], ready: Any) -> int:
    ended = threading.Event()
    daemon = Daemon(ended.set)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: ended.set())
    setup = _Setup(daemon)
    try:
        for key, value in steps:
            try:
                setup.do(key, value)
            except CowhandError as error:
                raise Failure(f"--{key} {value}: {error.qemu()}") from None
        for key, value in steps:
            if key == "pidfile":
                _write_pid(value)
        ready()
        while not ended.wait(1.0):
            pass
    finally:
        daemon.quitting = True
        try:
            daemon.close()
        finally:
            for monitor in setup.monitors:
                monitor.close()
            for path in [*setup.socket_paths, *(value for key, value in steps if key == "pidfile")]:
                with contextlib.suppress(OSError):
                    os.unlink(path)
    return 0


def _daemonized(steps: Sequence[tuple[str, str]]) -> int:
    """Serve in a child process; the parent ends when the child serves, or with what it said when it cannot."""
    read, write = os.pipe()
    pid = os.fork()  # before there is any thread or lock
    if pid:
        os.close(write)
        with os.fdopen(read, "rb") as told:
            started = told.read() == b"ok"
        if started:
            return 0
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status) or 1
    os.close(read)
    os.setsid()

    def ready() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        os.write(write, b"ok")
        os.close(write)

    return _serve([(key, value) for key, value in steps if key != "daemonize"], ready)


def _write_pid(path: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as error:
        raise Failure(f"--pidfile {path}: cannot create PID file: {error.strerror}") from None


def _keyval(text: str, implied: str | None) -> dict[str, Any]:
    """Return what an option's text means: JSON, or "name=value,..." with dotted names, whose values stay text."""
    if text.startswith("{"):
        from cowhand.block.opening.json_names import parse_json_name

        return parse_json_name("json:" + text)
    out: dict[str, Any] = {}
    for pair in parse(text, implied):
        if pair.short and pair.name not in ("pretty", "server", "nowait", "wait"):
            raise InvalidArgument(f"Expected '=' after parameter '{pair.name}'")
        out[pair.name] = pair.value
    return nest(out)


def _object(text: str) -> dict[str, Any]:
    if text in ("help", "?"):
        from cowhand.daemon.commands.objects import TYPES

        print("List of user creatable objects:", *sorted(TYPES), sep="\n  ")
        raise Failure(status=0)
    given = _keyval(text, "qom-type")
    limits = {name.removeprefix("x-"): value for name, value in given.items() if name.startswith("x-")}
    if limits:
        given = {name: value for name, value in given.items() if not name.startswith("x-")}
        given["limits"] = {**limits, **given.get("limits", {})}
    return given


def _export(given: dict[str, Any]) -> dict[str, Any]:
    """Return what an option says of an export, by the types that QMP has."""
    out = dict(given)
    for name in ("writable", "writethrough", "allocation-depth", "growable", "fixed-iothread"):
        if isinstance(out.get(name), str):
            out[name] = _flag(out[name])
    for name in ("logical-block-size", "num-queues"):
        if isinstance(out.get(name), str):
            out[name] = int(out[name])
    bitmap = out.pop("bitmap", None)
    if bitmap is not None:
        out["bitmaps"] = [bitmap]
    if isinstance(out.get("bitmaps"), dict):
        out["bitmaps"] = list(out["bitmaps"].values())
    return out


def _flag(text: Any) -> bool:
    found = _FLAGS.get(str(text).lower())
    if found is None:
        raise InvalidArgument(f"'{text}' is neither on nor off")
    return found

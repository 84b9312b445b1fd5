"""One monitor: negotiation, commands in the order in which they come, answers and events in the order in which they arise.

Source: QEMU ``docs/interop/qmp-spec``. A monitor that does not read is bounded: past :data:`MAX_WAITING` bytes of answers it is hung up on.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.daemon.daemon import VERSION, CommandNotFound
from cowhand.daemon.wire import Parser, SyntaxProblem, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from cowhand.daemon.daemon import Daemon

MAX_WAITING = 16 << 20
_MEMBERS = frozenset(("execute", "exec-oob", "arguments", "id"))


class Monitor:
    """Speaks with one client: :meth:`receive` takes what it sent, *send* (which may block) gets what it is sent, by a thread of its own."""

    def __init__(
        self, daemon: Daemon, send: Callable[[bytes], None], hang_up: Callable[[], None], *, pretty: bool = False
    ) -> None:
        self._daemon = daemon
        self._send = send
        self._hang_up = hang_up
        self._pretty = pretty
        self._parser = Parser()
        self._negotiated = False
        self._oob = False
        self._condition = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._closed = False
        self._sender = threading.Thread(target=self._run, name="monitor-send", daemon=True)

    def start(self) -> None:
        """Greet the client."""
        self._put({"QMP": {"version": VERSION, "capabilities": ["oob"]}})
        self._sender.start()

    def close(self) -> None:
        """End, after what waits was sent."""
        self._daemon.stop_listening(self._event)
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._sender.join(5)

    # -- out

    def _event(self, event: dict[str, Any]) -> None:
        self._put(event)

    def _put(self, value: dict[str, Any]) -> None:
        data = encode(value, pretty=self._pretty)
        with self._condition:
            if self._closed:
                return
            self._size += len(data)
            if self._size > MAX_WAITING:
                self._closed = True
                self._waiting.clear()
            else:
                self._waiting.append(data)
            self._condition.notify_all()
            full = self._closed
        if full:
            self._hang_up()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                data = b"".join(self._waiting)
                self._waiting.clear()
                self._size = 0
            try:
                self._send(data)
            except OSError:
                with self._condition:
                    self._closed = True
                return

    # -- in

    def receive(self, data: bytes) -> None:
        """Take bytes from the client, and do what they ask for."""
        for value in self._parser.feed(data):
            ident: dict[str, Any] = {}
            try:
                if isinstance(value, SyntaxProblem):
                    raise value
                if not isinstance(value, dict):
                    raise InvalidArgument("QMP input must be a JSON object")
                if "id" in value:
                    ident["id"] = value["id"]
                answer: dict[str, Any] = {"return": self._execute(value), **ident}
            except CowhandError as error:
                answer = {**ident, "error": {"class": error.qmp_class, "desc": error.qemu()}}
            self._put(answer)
            if self._daemon.quitting:
                return

    def _execute(self, value: dict[str, Any]) -> Any:
        for name in value:
            if name not in _MEMBERS or (name == "exec-oob" and not self._oob):
                raise InvalidArgument(f"QMP input member '{name}' is unexpected")
        if "execute" in value and "exec-oob" in value:
            raise InvalidArgument("QMP input member 'exec-oob' clashes with 'execute'")
        command = value.get("execute", value.get("exec-oob"))
        if command is None:
            raise InvalidArgument("QMP input lacks member 'execute'")
        if not isinstance(command, str):
            raise InvalidArgument("QMP input member 'execute' must be a string")
        arguments = value.get("arguments", {})
        if not isinstance(arguments, dict):
            raise InvalidArgument("QMP input member 'arguments' must be an object")
        if command == "qmp_capabilities":
            return self._negotiate(arguments)
        if not self._negotiated:
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        if "exec-oob" in value:
            raise InvalidArgument(f"The command {command} does not support OOB")
        return self._daemon.execute(command, arguments)

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        from cowhand.daemon.types import check_arguments

        if self._negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        given = check_arguments({"*enable": ["QMPCapability"]}, arguments)
        self._oob = "oob" in given.get("enable", [])
        self._negotiated = True
        self._daemon.listen(self._event)
        return {}

"""A storage daemon started for a test, and the client that drives it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Seconds that one answer may take: a loaded machine is slow.
PATIENCE = 120.0


class StorageDaemon:
    """One daemon with a monitor on a socket in *folder*; *program* is ours or QEMU's. Close it, or use ``with``."""

    def __init__(self, program: Sequence[str], folder: Path, *options: str) -> None:
        self.folder = folder
        path = folder / "monitor"
        self.process = subprocess.Popen(
            [*program, *options, "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        try:
            self._connect(path)
            self._buffer = b""
            self.greeting = self._next()
            self.raw(b'{"execute": "qmp_capabilities"}')
        except BaseException:
            self.close()
            raise

    def _connect(self, path: Path) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self._socket.connect(os.fspath(path))
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.02)
            else:
                return

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError("the daemon hung up")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(data)

    def raw(self, data: bytes) -> dict[str, Any]:
        """Send bytes and return the answer; events before it are kept."""
        self.send(data)
        while "event" in (answer := self._next()):
            self.events.append((answer["event"], answer["data"]))
        return answer

    def ask(self, command: str, /, **arguments: Any) -> Any:
        """Do a command and return what it answers, or its error. Underscores in names stand for dashes."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer = self.raw(json.dumps({"execute": command, "arguments": given}).encode())
        return answer["return"] if "return" in answer else answer["error"]

    def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """Return the data of the next event of that name, with those values; earlier ones that were kept count."""
        position = 0
        while True:
            while position >= len(self.events):
                found = self._next()
                self.events.append((found["event"], found["data"]))
            event, told = self.events[position]
            if event == name and all(told.get(key) == value for key, value in data.items()):
                return told
            position += 1

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the events so far, and forget them."""
        events, self.events = self.events, []
        return events

    def quit(self) -> int:
        """End the daemon and return its exit status."""
        self.ask("quit")
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self._socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

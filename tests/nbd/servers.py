"""NBD servers for tests: real ones, started on a Unix socket, and one that says what a test tells it to say."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from cowhand.nbd import options
from cowhand.nbd.constants import (
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_NO_ZEROES,
    FLAG_SEND_FLUSH,
    FLAG_SEND_WRITE_ZEROES,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INIT_MAGIC,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION_MAGIC,
    REP_ACK,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
)
from cowhand.nbd.requests import HEADER, RequestHeader, decode_request
from tests.tools.patience import PATIENCE
from tests.tools.programs import find, require

require_nbdkit = require("nbdkit")
Argument = str | os.PathLike[str]


class Process:
    """A server that runs until the block is left. ``uri`` names its default export."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self.socket = path

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextmanager
def qemu_nbd(
    folder: Path, image: Argument, *arguments: Argument, format: str = "raw", name: str = "qemu-nbd.sock"
) -> Iterator[Process]:
    """Serve *image* by qemu-nbd to several clients until the block is left."""
    path = folder / name
    program = find("qemu-nbd")
    assert program is not None
    words = [program, "-k", path, "-f", format, "--persistent", "--shared=8", *arguments, image]
    with _serving(words, path) as process:
        yield process


@contextmanager
def nbdkit(folder: Path, *arguments: Argument) -> Iterator[Process]:
    """Serve what the *arguments* of nbdkit say."""
    path = folder / "nbdkit.sock"
    program = find("nbdkit")
    assert program is not None
    with _serving([program, "--foreground", "--exit-with-parent", "-U", path, *arguments], path) as process:
        yield process


@contextmanager
def _serving(words: Sequence[Argument], path: Path) -> Iterator[Process]:
    path.unlink(missing_ok=True)
    server = Process(subprocess.Popen([os.fspath(word) for word in words], stdin=subprocess.DEVNULL), path)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _listens(path):
            assert server.process.poll() is None, f"{words[0]} ended with status {server.process.returncode}"
            assert time.monotonic() < deadline, f"{words[0]} does not listen"
            time.sleep(0.01)
        yield server
    finally:
        server.stop()


def _listens(path: Path) -> bool:
    # Looked at, not connected to: a server may count its clients. Bound is not listening yet: linux/net.h, __SO_ACCEPTCON.
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()
    except OSError:
        return path.exists()
    return any(words[-1] == str(path) and int(words[3], 16) & 0x10000 for words in map(str.split, lines[1:]))


class Hung(Exception):
    """The client is gone."""


class Peer:
    """A server's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise Hung
            data += piece
        return data

    def send(self, *pieces: bytes) -> None:
        self.sock.sendall(b"".join(pieces))

    def option(self) -> tuple[int, bytes]:
        """Return the client's next option."""
        head = self.receive(16)
        assert head[:8] == OPTION_MAGIC
        return int.from_bytes(head[8:12], "big"), self.receive(int.from_bytes(head[12:], "big"))

    def greet(self) -> None:
        self.send(INIT_MAGIC, OPTION_MAGIC, (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_bytes(2, "big"))
        self.receive(4)

    def agree(
        self,
        size: int = 1 << 20,
        flags: int = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_WRITE_ZEROES,
        *,
        structured: bool = True,
        blocks: tuple[int, int, int] | None = None,
    ) -> None:
        """Do an honest handshake."""
        self.greet()
        while True:
            option, _ = self.option()
            if option == OPT_GO:
                info = INFO_EXPORT.to_bytes(2, "big") + size.to_bytes(8, "big") + flags.to_bytes(2, "big")
                self.send(options.encode_reply(option, REP_INFO, info))
                if blocks is not None:
                    sizes = b"".join(value.to_bytes(4, "big") for value in blocks)
                    self.send(options.encode_reply(option, REP_INFO, INFO_BLOCK_SIZE.to_bytes(2, "big") + sizes))
                self.send(options.encode_reply(option, REP_ACK))
                return
            if option == OPT_STRUCTURED_REPLY and structured:
                self.send(options.encode_reply(option, REP_ACK))
            elif option == OPT_SET_META_CONTEXT:
                self.send(options.encode_reply(option, REP_META_CONTEXT, b"\0\0\0\7base:allocation"))
                self.send(options.encode_reply(option, REP_ACK))
            else:
                self.send(options.encode_reply(option, REP_ERR_UNSUP))

    def request(self) -> RequestHeader:
        return decode_request(self.receive(HEADER))


class Scripted:
    """A server on *path* that does with each connection what *script* says. Connections are served one at a time."""

    def __init__(self, path: Path, script: Callable[[Peer], None]) -> None:
        self.path = path
        self.connections = 0
        self.error: BaseException | None = None
        self._script = script
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._current: socket.socket | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name="scripted-server")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def _serve(self) -> None:
        while not self._ended:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._current = sock
            self.connections += 1
            with sock:
                try:
                    self._script(Peer(sock))
                except (Hung, OSError):
                    pass
                except BaseException as error:  # noqa: BLE001 - told when the block is left
                    self.error = error

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        for sock in (self._listener, self._current):
            if sock is not None:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        self._listener.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if error is None and self.error is not None:
            raise self.error

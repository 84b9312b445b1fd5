"""More processes for servers of images that nobody writes: they accept clients on the same sockets, and open the images themselves.

One interpreter does one thing at a time, so several connections gain nothing in one process. Workers are new processes, not forks:
locks and threads of this one are not theirs. Each ends when its standard input does, that is with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

#: Seconds that a worker gets for what its clients asked before.
GRACE = 15.0
#: Tells a worker the numbers of its sockets' descriptors.
_VARIABLE = "COWHAND_SERVE_SOCKETS"


class Workers:
    """Processes that run ``python -m cowhand`` with *words*, and have the sockets *listening* (see :func:`inherited_sockets`)."""

    def __init__(self, count: int, words: Sequence[str], listening: Sequence[socket.socket]) -> None:
        numbers = [sock.fileno() for sock in listening]
        command = [sys.executable, "-m", "cowhand", *words]
        environment = {**os.environ, _VARIABLE: ",".join(map(str, numbers))}
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(count):
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=numbers, env=environment)
                )
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> int:
        """How many run."""
        return sum(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        """Let them do what was asked of them, and end."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def inherited_sockets() -> list[socket.socket]:
    """Return the listening sockets of a worker; none in any other process."""
    numbers = os.environ.pop(_VARIABLE, "")
    return [socket.socket(fileno=int(number)) for number in numbers.split(",") if number.isdecimal()]


def when_the_parent_ends(act: Callable[[], None]) -> None:
    """Call *act*, in a thread of its own, when standard input ends."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        act()

    threading.Thread(target=wait, name="parent", daemon=True).start()

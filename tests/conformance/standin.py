"""Stand in for a QEMU with the qtest accelerator, which distributions leave out of their builds.

Started as qemu-system-*: takes ``-accel qtest`` and ``-qtest SOCKET`` out, runs the real QEMU with TCG and a firmware that halts
the processor at once (as with qtest, the machine runs and its guest does nothing), and answers "OK" to whatever comes over
the qtest socket. What needs qtest's clock or its memory access cannot work this way and fails.

This file is started by path, with nothing but the standard library, once for each virtual machine of the tests.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

#: The firmware: 64 KiB that end at the x86 reset vector, where the processor finds "hlt; jmp back".
FIRMWARE_BYTES = 64 * 1024
RESET_VECTOR = FIRMWARE_BYTES - 16
HALT = b"\xf4\xeb\xfd"


def firmware() -> bytes:
    """Return a firmware image whose only instruction stops the processor."""
    image = bytearray(FIRMWARE_BYTES)
    image[RESET_VECTOR : RESET_VECTOR + len(HALT)] = HALT
    return bytes(image)


def translate(arguments: list[str], halt: str) -> tuple[list[str], str | None]:
    """Return the real QEMU's arguments and the path of the qtest socket. *halt* is the firmware's path."""
    real: list[str] = []
    qtest: str | None = None
    rest = iter(arguments)
    for argument in rest:
        if argument == "-qtest":
            qtest = next(rest, "").removeprefix("unix:").removeprefix("path=").partition(",")[0]
        elif argument == "-qtest-log":
            next(rest, None)
        elif argument == "-accel":
            accelerator = next(rest, "")
            real += ["-accel", "tcg", "-bios", halt] if accelerator == "qtest" else ["-accel", accelerator]
        else:
            real.append(argument.replace("accel=qtest", "accel=tcg"))
    return real, qtest


def answer(path: str) -> None:
    """Connect to the test's qtest socket and acknowledge each line until the test closes it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        while received := connection.recv(4096):
            connection.sendall(b"OK\n" * received.count(b"\n"))


def _answer_apart(path: str) -> None:
    """Answer in a process of its own that keeps none of the caller's pipes open."""
    if os.fork() != 0:
        os.wait()
        return
    if os.fork() != 0:
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, 1024)
    with contextlib.suppress(OSError):
        answer(path)
    os._exit(0)


def main(qemu: str, halt: str, arguments: list[str]) -> None:
    """Become *qemu*; does not return."""
    real, qtest = translate(arguments, halt)
    if qtest:
        _answer_apart(qtest)
    os.execv(qemu, [qemu, *real])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

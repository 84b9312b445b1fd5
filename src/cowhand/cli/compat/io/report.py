"""What the I/O tool prints of a request: its statistics, its bytes, its error."""

from __future__ import annotations

import errno
import os
import sys

from cowhand.cli.compat import program
from cowhand.cli.compat.io.parsing import Complaint
from cowhand.cli.compat.program import Fatal
from cowhand.cli.compat.sizes import precise
from cowhand.core import clock
from cowhand.core.errors import CowhandError, OutOfRange, VerificationFailed


class Timer:
    """Measures one request."""

    def __init__(self) -> None:
        self._begin = clock.monotonic()
        self.seconds = 0.0

    def stop(self) -> None:
        self.seconds = max(clock.monotonic() - self._begin, 1e-9)


def statistics(what: str, timer: Timer, offset: int, count: int, total: int, *, terse: bool) -> None:
    """Print the line or lines of a request that is done."""
    seconds = timer.seconds
    rate, operations = total / seconds, 1 / seconds
    if terse:
        print(f"{total},1,{_clock(seconds)},{rate:.3f},{operations:.3f}")
        return
    duration = _clock(seconds) if seconds >= 1 else f"{seconds:05.2f} sec"
    print(f"{what} {total}/{count} bytes at offset {offset}")
    print(f"{precise(total)}, 1 ops; {duration} ({precise(rate)}/sec and {operations:.4f} ops/sec)")


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60 + seconds - whole:05.2f}"


def dump(data: bytes | bytearray | memoryview, offset: int) -> None:
    """Print *data* in hexadecimal, sixteen bytes a line, with what is a letter or a digit beside."""
    out = sys.stdout
    for start in range(0, len(data), 16):
        line = bytes(data[start : start + 16])
        text = "".join(chr(byte) if byte < 128 and chr(byte).isalnum() else "." for byte in line)
        out.write(f"{offset + start:08x}:  {''.join(f'{byte:02x} ' for byte in line)} {text}\n")


def verify(data: bytes | bytearray | memoryview, byte: int, offset: int) -> bool:
    """Tell whether all of *data*, which lies at *offset*, is *byte*; say so where it is not."""
    if bytes(data) == bytes([byte]) * len(data):
        return True
    print(f"Pattern verification failed at offset {offset}, {len(data)} bytes")
    return False


def number_of(error: CowhandError) -> int:
    """Return the errno that QEMU reports for *error*: a request beyond the end is an input/output error there.

    Raises Fatal for two copies that differ, after saying so: the tool ends then.
    """
    if isinstance(error, VerificationFailed):
        sys.stdout.flush()
        program.plain(error.message)
        raise Fatal
    return errno.EIO if isinstance(error, OutOfRange) else error.number


def failed(what: str, error: CowhandError) -> Complaint:
    """Return the complaint that *what* failed with *error*."""
    return Complaint(f"{what} failed: {os.strerror(number_of(error))}")

"""What the bytes alone cost: two threads that read and write (or read and compare) pieces, with nothing else in the process.

``python -I -S bare.py copy SOURCE TARGET`` packs the data of a sparse SOURCE into TARGET; ``compare ONE OTHER`` compares two raw disks
whose data lies at the same places. No format, no check, no error handling: so it tells how near a goal one can come.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator

PIECE = 1 << 20
ZEROES = bytes(PIECE)
#: linux/falloc.h: the file's length stays, which makes writing into the space cheaper.
KEEP_SIZE = 1
fallocate = ctypes.CDLL(None).fallocate
fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def pieces(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what holds data."""
    end, at = os.fstat(descriptor).st_size, 0
    while at < end:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            return
        stop = os.lseek(descriptor, at, os.SEEK_HOLE)
        while at < stop:
            length = min(PIECE, stop - at)
            yield at, length
            at += length


def copy(source: int, target: int) -> Callable[[], None]:
    """Return what each thread does for a copy that leaves out zeroes."""
    work, lock, place = pieces(source), threading.Lock(), [0]

    def run() -> None:
        buffer = bytearray(PIECE)
        view = memoryview(buffer)
        while True:
            with lock:
                at, length = next(work, (0, 0))
            if not length:
                return
            os.preadv(source, (view[:length],), at)
            if buffer.startswith(ZEROES[:64]) and buffer == ZEROES:
                continue
            with lock:
                to = place[0]
                place[0] += length
            fallocate(target, KEEP_SIZE, to, length)
            os.pwritev(target, (view[:length],), to)

    return run


def compare(one: int, other: int) -> Callable[[], None]:
    """Return what each thread does for a comparison of data with data."""
    work, lock = pieces(one), threading.Lock()

    def run() -> None:
        left, right = bytearray(PIECE), bytearray(PIECE)
        while True:
            with lock:
                at, length = next(work, (0, 0))
            if not length:
                return
            os.preadv(one, (memoryview(left)[:length],), at)
            os.preadv(other, (memoryview(right)[:length],), at)
            if left != right:
                os._exit(1)

    return run


def main(kind: str, one: str, other: str) -> None:
    """Run two threads and leave at once."""
    first = os.open(one, os.O_RDONLY)
    second = os.open(other, os.O_RDWR | os.O_CREAT) if kind == "copy" else os.open(other, os.O_RDONLY)
    run = copy(first, second) if kind == "copy" else compare(first, second)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:4])

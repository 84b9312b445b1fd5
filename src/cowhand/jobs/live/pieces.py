"""The pieces of a job, done by several threads: each begins with a pause point, and ends well, or by the job's error policy.

The order inside a piece is: leases on all disks concerned, then the range lock, then reading and writing. A range lock taken before the
gate of a disk would wait for a drain that waits for its holder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from cowhand.block.disk import Disk
from cowhand.core.errors import CowhandError
from cowhand.jobs.job import Job

WORKERS = 2


class Pieces:
    """Takes (offset, length) pieces from an iterator, and has *copy* do each, with leases on *disks*."""

    def __init__(
        self, job: Job, disks: Iterable[Disk], copy: Callable[[int, int], int], *, workers: int = WORKERS
    ) -> None:
        self._job = job
        self._disks = tuple(disks)
        self._copy = copy
        self._workers = workers
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def run(self, pieces: Iterator[tuple[int, int]]) -> int:
        """Do all *pieces*; return how many were left out by the policy "ignore". Raises the first error that ends the job, or Cancelled."""
        left = [0] * self._workers
        if self._workers == 1:
            self._work(pieces, left, 0)
        else:
            threads = [
                threading.Thread(target=self._work, args=(pieces, left, number), name=f"{self._job.id}-{number}")
                for number in range(self._workers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return sum(left)

    def _work(self, pieces: Iterator[tuple[int, int]], left: list[int], number: int) -> None:
        try:
            while self._failure is None:
                self._job.pause_point()
                with self._lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                if not self._do(*piece):
                    left[number] += 1
        except BaseException as error:  # noqa: BLE001 - raised by run() in the job's thread
            with self._lock:
                self._failure = self._failure or error

    def _do(self, offset: int, length: int) -> bool:
        while True:
            self._job.pause_point(length)
            try:
                done = self._leased(offset, length)
            except CowhandError as error:
                if not self._job.handle_error(error, reading=error.facts.get("doing") != "writing"):
                    time.sleep(0.001)  # what fails at once, over and over, does not take a whole core
                    return False
                continue
            self._job.progress.advance(done)
            return True

    def _leased(self, offset: int, length: int) -> int:
        from contextlib import ExitStack

        with ExitStack() as stack:
            for disk in self._disks:
                stack.enter_context(disk.lease())
            return self._copy(offset, length)


def cut(extents: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield *extents* cut into pieces that end on multiples of *size*."""
    for offset, length in extents:
        end = offset + length
        while offset < end:
            stop = min(end, offset - offset % size + size)
            yield offset, stop - offset
            offset = stop

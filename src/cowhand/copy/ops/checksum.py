"""Checksums of what a guest sees: the same for every format, chain and layout that holds the same disk. Zeroes are not read.

A plain algorithm ("sha256") gives what sha256sum gives for the raw disk. A tree of one ("tree-sha256") is the hash of the hashes of blocks of 64 KiB,
the last one perhaps shorter, one behind the other, followed by the disk's size in bytes (64 bits, big-endian). Its blocks are hashed by all cores,
and a block of zeroes costs 32 bytes of hashing, so that an empty TiB takes a second and not an hour.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.copy.engine import plan
from cowhand.copy.engine.plan import Policy, Run
from cowhand.copy.engine.source import Source
from cowhand.core.buffers import is_zero
from cowhand.core.errors import InvalidArgument
from cowhand.core.progress import CancelToken, Progress
from cowhand.image.open import Image, open_source

if TYPE_CHECKING:
    from cowhand.block.node.records import SnapshotInfo
    from cowhand.block.opening.policy import Policy as OpenPolicy

#: Algorithms of fixed length that Python always has.
ALGORITHMS = (
    "md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sha3_224", "sha3_256", "sha3_384", "sha3_512", "blake2b", "blake2s",
)  # fmt: skip
TREE = "tree-"
DEFAULT_ALGORITHM = "sha256"
BLOCK = 64 << 10
#: Bytes that are read at once; whole blocks.
PIECE = 1 << 20
#: Zeroes that are hashed at once.
_ZEROES = bytes(PIECE)
#: Hashes of zero blocks that are hashed at once: those of a GiB.
_MANY = 1 << 14


class Checksum(NamedTuple):
    """``digest`` in hexadecimal of a disk of ``size`` bytes (whole sectors of 512 bytes, as a guest sees it)."""

    algorithm: str
    digest: str
    size: int


def check_algorithm(name: str) -> str:
    """Return *name*; raise InvalidArgument for an algorithm that is not known."""
    if name.removeprefix(TREE) not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise InvalidArgument(
            f"'{name}' is not a checksum algorithm", hint=f"One of {known}; or one of them with the prefix {TREE}."
        )
    return name


def checksum(
    what: Image,
    algorithm: str = DEFAULT_ALGORITHM,
    *,
    format: str | None = None,
    snapshot: str | SnapshotInfo | None = None,
    force_share: bool = False,
    workers: int | None = None,
    policy: OpenPolicy | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Checksum:
    """Hash the content of a disk (at *snapshot*). *progress* counts bytes of data; zeroes that are known are not read.

    Raises InvalidArgument for an unknown algorithm, Cancelled, and what opening and reading raise.
    """
    check_algorithm(algorithm)
    cancel = cancel or CancelToken()
    with ExitStack() as stack:
        disk = open_source(what, stack, format, snapshot=snapshot, force_share=force_share, policy=policy)
        source = Source([disk])
        tree = algorithm.startswith(TREE)
        runs = Policy(unit=BLOCK if tree else 1)
        if progress is not None:
            progress.total = plan.totals(source.runs(runs)).data
        hasher: _Plain | _Tree = (_Tree if tree else _Plain)(algorithm.removeprefix(TREE))
        threads = workers or (min(16, os.cpu_count() or 1) if tree else 2)
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="checksum"))
        for run, value in _in_order(pool, threads, source, source.runs(runs), hasher.digest_of, cancel):
            cancel.check()
            if run.kind == plan.DATA:
                hasher.add(value)
                if progress is not None:
                    progress.advance(run.length)
            else:
                for step in _steps(run.length, cancel):
                    hasher.add_zeroes(step)
        if progress is not None:
            progress.finish()
        return Checksum(algorithm, hasher.finish(source.size), source.size)


def _steps(length: int, cancel: CancelToken) -> Iterator[int]:
    """Yield parts of *length*, so small that cancelling does not wait."""
    most = _MANY * BLOCK
    while length:
        cancel.check()
        step = min(most, length)
        yield step
        length -= step


def _in_order(
    pool: ThreadPoolExecutor,
    threads: int,
    source: Source,
    runs: Iterator[Run],
    digest_of: Callable[[bytearray], Any],
    cancel: CancelToken,
) -> Iterator[tuple[Run, Any]]:
    """Yield each piece and what *digest_of* made of its bytes (None for zeroes), in order; some pieces are read ahead."""

    def read(run: Run) -> Any:
        cancel.check()
        buffer = bytearray(run.length)
        source.read_into(run.start, memoryview(buffer))
        return digest_of(buffer)

    waiting: deque[tuple[Run, Future[Any] | None]] = deque()
    try:
        for piece in _pieces(runs):
            waiting.append((piece, pool.submit(read, piece) if piece.kind == plan.DATA else None))
            if len(waiting) > 2 * threads:
                yield _done(waiting)
        while waiting:
            yield _done(waiting)
    finally:
        for _, future in waiting:
            if future is not None:
                future.cancel()


def _done(waiting: deque[tuple[Run, Future[Any] | None]]) -> tuple[Run, Any]:
    run, future = waiting.popleft()
    return run, future.result() if future is not None else None


def _pieces(runs: Iterator[Run]) -> Iterator[Run]:
    for run in runs:
        if run.kind != plan.DATA:
            yield run
            continue
        start = run.start
        while start < run.end:
            end = min(run.end, (start // PIECE + 1) * PIECE)
            yield Run(start, end - start, plan.DATA)
            start = end


class _Plain:
    """One hash over all bytes."""

    def __init__(self, name: str) -> None:
        self._hash = hashlib.new(name, usedforsecurity=False)

    @staticmethod
    def digest_of(data: bytearray) -> bytearray:
        return data

    def add(self, data: bytearray) -> None:
        self._hash.update(data)

    def add_zeroes(self, length: int) -> None:
        view = memoryview(_ZEROES)
        while length:
            step = min(length, PIECE)
            self._hash.update(view[:step])
            length -= step

    def finish(self, size: int) -> str:
        return self._hash.hexdigest()


class _Tree:
    """A hash of the blocks' hashes. Runs of data begin and end on blocks, or at the end of the disk; so do those of zeroes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._hash = hashlib.new(name, usedforsecurity=False)
        self._zero = self._digest(memoryview(_ZEROES)[:BLOCK])
        self._zeroes = self._zero * _MANY

    def _digest(self, data: memoryview) -> bytes:
        return hashlib.new(self._name, data, usedforsecurity=False).digest()

    def digest_of(self, data: bytearray) -> bytes:
        out = []
        with memoryview(data) as view:
            for begin in range(0, len(data), BLOCK):
                block = view[begin : begin + BLOCK]
                out.append(self._zero if len(block) == BLOCK and is_zero(block) else self._digest(block))
        return b"".join(out)

    def add(self, digests: bytes) -> None:
        self._hash.update(digests)

    def add_zeroes(self, length: int) -> None:
        blocks, rest = divmod(length, BLOCK)
        self._hash.update(memoryview(self._zeroes)[: blocks * len(self._zero)])
        if rest:
            self._hash.update(self._digest(memoryview(_ZEROES)[:rest]))

    def finish(self, size: int) -> str:
        self._hash.update(size.to_bytes(8, "big"))
        return self._hash.hexdigest()

"""Bytes behind a descriptor: reading, writing, flushing, zeroing and discarding for the drivers of files and devices.

Sources: preadv(2) and pwritev(2) (RWF_DSYNC), fdatasync(2), fallocate(2). A flush is fdatasync(2); Python repeats calls that a signal interrupts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.block.format_io import readahead
from cowhand.block.node.node import READ, WRITE_REQUEST, BlockNode, Failures, Request
from cowhand.core import syscalls
from cowhand.core.buffers import ZEROES, ZEROES_SIZE, Buffer, fill_zero, give, take
from cowhand.core.errors import CowhandError, IOFailed, NotSupported, Poisoned, from_os_error

if TYPE_CHECKING:
    from cowhand.block.node.options import NodeOptions

_DSYNC = getattr(os, "RWF_DSYNC", 0)
_preadv = syscalls.preadv
_pwritev = syscalls.pwritev

#: The kernel takes at most so many buffers in one call (IOV_MAX).
MAX_BUFFERS = 1024
#: What a write says when there is no space, and a flush of a medium that only seemed to have some (thin pools, network file systems).
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
#: Unaligned memory is copied through aligned memory in pieces of this size.
BOUNCE_SIZE = 1 << 20


class DescriptorNode(BlockNode):
    """A node whose bytes lie behind the descriptor ``fd``; subclasses open it.

    After a failed flush nobody knows what is on the medium: the node then refuses every change until it is opened again.
    """

    def __init__(self, options: NodeOptions, path: str) -> None:
        super().__init__(options)
        self.path = path
        self.fd = -1
        self.direct = options.cache_direct
        self.failure: int | None = None  #: errno of the flush that failed
        self._can_punch = self._can_zero = self._can_dsync = True

    @property
    def size(self) -> int:
        try:
            return syscalls.end_of(self.fd)
        except OSError as error:
            raise self._failed(error, "asking for the size") from error

    @property
    def filename(self) -> str:
        # A name that begins like a protocol's would mean something else to who reads it: QEMU writes it so, too.
        return f"./{self.path}" if ":" in self.path.split("/", 1)[0] else self.path

    def _failed(self, error: OSError | OverflowError, doing: str, offset: int | None = None) -> CowhandError:
        raised = from_os_error(error, self.path, doing=doing)
        if raised.offset is None:
            raised.offset = offset
        return raised

    # -- reading

    def read_into(self, offset: int, buffer: Buffer) -> None:
        try:
            done = _preadv(self.fd, (buffer,), offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise self._failed(error, "reading", self._first_bad(error, offset, len(buffer))) from error
            done = 0
        except OverflowError as error:
            raise self._failed(error, "reading", offset) from error
        if done != len(buffer):
            self._read_rest(offset, memoryview(buffer), done)

    def _read_rest(self, offset: int, view: memoryview, done: int) -> None:
        """Go on behind *done* bytes: after a short read, at the end of the file, or with unaligned memory under direct I/O."""
        length = len(view)
        end = -1  #: the file's length, as it was when a read had found no bytes
        while done < length:
            try:
                if self.direct:
                    count = self._read_bounced(offset + done, view[done:])
                else:
                    count = _preadv(self.fd, (view[done:],), offset + done)
            except OSError as error:
                place = self._first_bad(error, offset + done, length - done)
                raise self._failed(error, "reading", place) from error
            done += count
            if count == 0:
                # Asked for after the read: another thread may have made the file longer since, and then its bytes are read after all.
                before, end = end, self.size
                if offset + done >= end:
                    fill_zero(view[done:])
                    return
                if end == before:
                    raise IOFailed(
                        "reading failed: no bytes where there should be some", path=self.path, offset=offset + done
                    )

    def _first_bad(self, error: OSError, offset: int, length: int) -> int:
        """Return where in ``[offset, offset + length)``, the reading of which failed, the medium gives nothing: the error is of the whole request."""
        block = max(512, self.limits.request_alignment)
        if error.errno != errno.EIO or offset % block:
            return offset
        probe = take(-(-length // block) * block)
        try:
            while length > block:
                half = max(block, length // 2 // block * block)
                try:
                    count = _preadv(self.fd, (probe[:half],), offset) // block * block
                except OSError:
                    length = half
                    continue
                if not count:
                    break
                offset, length = offset + count, length - count
        finally:
            give(probe)
        return offset

    def _read_bounced(self, offset: int, view: memoryview) -> int:
        """Read at any offset into any memory by way of aligned memory; return how many bytes, 0 at the end of the file."""
        block = self.limits.request_alignment
        head = offset % block
        whole = min(BOUNCE_SIZE, -(-(head + len(view)) // block) * block)
        bounce = take(whole)
        try:
            got = _preadv(self.fd, (bounce,), offset - head)
            count = max(0, min(got - head, len(view)))
            view[:count] = bounce[head : head + count]
        finally:
            give(bounce)
        return count

    # -- writing

    def _poison(self, number: int) -> None:
        # The page cache may now call clean what never reached the medium; a second flush would lie.
        self.failure = number
        self.lane_fd = -1

    def refuse_poisoned(self) -> None:
        """Raise Poisoned: for changes that come after a failed flush."""
        raise Poisoned(
            "an earlier flush failed, so it is not known what is on the medium",
            hint="Open the image again, and check it, before it is written to.",
            errno=self.failure,
            path=self.path,
        )

    def write(self, offset: int, buffers: Sequence[Buffer], fua: bool = False) -> None:
        if fua or self.failure is not None or len(buffers) > MAX_BUFFERS:
            self._write_special(offset, buffers, fua)
            return
        try:
            done = _pwritev(self.fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise self._failed(error, "writing", offset) from error
            done = 0
        except OverflowError as error:
            raise self._failed(error, "writing", offset) from error
        if done != (len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))):
            self._write_rest(offset, buffers, done)

    def _write_special(self, offset: int, buffers: Sequence[Buffer], fua: bool) -> None:
        if self.failure is not None:
            self.refuse_poisoned()
        if fua and not self.options.cache_no_flush:
            if not (_DSYNC and self._can_dsync) or len(buffers) > MAX_BUFFERS:
                self._write_special(offset, buffers, False)
                self.flush()
            else:
                self._write_stable(offset, buffers)
            return
        if self.direct and len(buffers) > MAX_BUFFERS:
            self._write_rest(offset, buffers, 0)  # parts of the list would end anywhere in a block
            return
        for first in range(0, len(buffers), MAX_BUFFERS):
            part = buffers[first : first + MAX_BUFFERS]
            self.write(offset, part)
            offset += sum(map(len, part))

    def _write_stable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write with RWF_DSYNC: only these bytes wait for the medium, not everything that the file has in the page cache."""
        try:
            done = _pwritev(self.fd, buffers, offset, _DSYNC)
        except OSError as error:
            misaligned = error.errno == errno.EINVAL and self.direct
            if misaligned or syscalls.is_unsupported(error):
                self._can_dsync = misaligned
                self.write(offset, buffers)
                self.flush()
                return
            if error.errno == errno.EIO or (error.errno in _FULL and self._takes(offset, buffers)):
                # Not the writing failed but the flush in it, of these bytes or, reported only once, of earlier ones.
                self._poison(error.errno or errno.EIO)
            raise self._failed(error, "writing", offset) from error
        except OverflowError as error:
            raise self._failed(error, "writing", offset) from error
        if done != sum(map(len, buffers)):
            self._write_rest(offset, buffers, done)
            self.flush()

    def _takes(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """Tell whether the page cache takes the bytes, so that it was not for want of space there that a stable write failed."""
        try:
            return _pwritev(self.fd, buffers, offset) == sum(map(len, buffers))
        except OSError:
            return False

    def _write_rest(self, offset: int, buffers: Sequence[Buffer], done: int) -> None:
        """Go on behind *done* bytes: after a short write, or with unaligned memory under direct I/O."""
        pieces = self._bounced(buffers, done) if self.direct else _behind(buffers, done)
        offset += done
        for view in pieces:
            while view:
                try:
                    count = _pwritev(self.fd, (view,), offset)
                except OSError as error:
                    raise self._failed(error, "writing", offset) from error
                if count == 0:
                    raise IOFailed("writing failed: no bytes were taken", path=self.path, offset=offset)
                offset += count
                view = view[count:]

    def _bounced(self, buffers: Sequence[Buffer], done: int) -> Iterator[memoryview]:
        """Yield what lies behind *done* bytes of *buffers*, copied to aligned memory, in pieces of BOUNCE_SIZE and a rest."""
        bounce = take(BOUNCE_SIZE)
        try:
            fill = 0
            for view in _behind(buffers, done):
                while view:
                    count = min(len(view), BOUNCE_SIZE - fill)
                    bounce[fill : fill + count] = view[:count]
                    fill += count
                    view = view[count:]
                    if fill == BOUNCE_SIZE:
                        yield bounce
                        fill = 0
            if fill:
                yield bounce[:fill]
        finally:
            give(bounce)

    def flush(self) -> None:
        if self.failure is not None:
            self.refuse_poisoned()
        if self.options.cache_no_flush:
            return
        try:
            _datasync(self.fd)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EINVAL) and not self.writable:
                return  # a medium that is only read has nothing to flush
            self._poison(error.errno or errno.EIO)
            raise self._failed(error, "flushing") from error

    # -- zeroes and discards

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        if self.failure is not None:
            self.refuse_poisoned()
        unmap = unmap and self.options.discard != "ignore"
        if not (unmap and self._punch_and_extend(offset, length)) and not self._zero_natively(offset, length):
            if not fallback:
                raise NotSupported("zeroes can only be written as bytes here", path=self.path, offset=offset)
            self._zero_bytes(offset, length)
        if fua:
            self.flush()

    def _attempt(self, call: Callable[[int, int, int], None], offset: int, length: int) -> bool | None:
        """Do *call*; tell whether it worked, None when the system does not have it at all. Raises when it failed."""
        try:
            call(self.fd, offset, length)
        except OSError as error:
            if syscalls.is_unsupported(error):
                return None
            if error.errno == errno.EINVAL:  # refused for this range: the bytes can still be written
                return False
            raise self._failed(error, "writing zeroes", offset) from error
        return True

    def _punch_and_extend(self, offset: int, length: int) -> bool:
        if not self._can_punch:
            return False
        done = self._attempt(syscalls.punch_hole, offset, length)
        self._can_punch = done is not None
        end = offset + length
        if not done:
            return False
        if end > self.size:
            # A hole never makes the file longer. Writing its last bytes does, without the race that fstat and ftruncate have.
            tail = min(length, self.limits.request_alignment)
            self.write(end - tail, (ZEROES[:tail],))
        return True

    def _zero_natively(self, offset: int, length: int) -> bool:
        if not self._can_zero:
            return False
        done = self._attempt(syscalls.zero_range, offset, length)
        self._can_zero = done is not None
        return bool(done)

    def _zero_bytes(self, offset: int, length: int) -> None:
        while length:
            count = min(length, ZEROES_SIZE)
            self.write(offset, (ZEROES[:count],))
            offset += count
            length -= count

    def discard(self, offset: int, length: int) -> None:
        if self.failure is not None:
            self.refuse_poisoned()
        if self.options.discard == "ignore" or not self._can_punch:
            return
        self._can_punch = self._attempt(syscalls.punch_hole, offset, length) is not None

    # -- many at once

    def submit(self, batch: Sequence[Request]) -> Failures | None:
        failures: Failures = {}
        index, count = 0, len(batch)
        if count > 1 and batch[0][0] == READ and not self.direct and readahead.is_cold(self.fd, batch[0][1]):
            wanted = [(offset, len(what)) for kind, offset, what in batch[: readahead.MOST] if kind == READ]
            readahead.announce(self.fd, wanted)
        while index < count:
            kind, offset, what = batch[index]
            index += 1
            try:
                if kind == READ:
                    if index < count and batch[index][1] == offset + len(what) and batch[index][0] == READ:
                        index = self._read_run(batch, index - 1, failures)
                    elif _preadv(self.fd, (what,), offset) != len(what):
                        self.read_into(offset, what)
                elif kind == WRITE_REQUEST:
                    if index < count and batch[index][1] == offset + len(what) and batch[index][0] == WRITE_REQUEST:
                        index = self._write_run(batch, index - 1, failures)
                    else:
                        self.write(offset, (what,))
                else:
                    self._singly(batch, index - 1, index, failures)
            except CowhandError as error:
                failures[index - 1] = error
            except (OSError, OverflowError) as error:
                # Once more by the way that knows what to do about it.
                again = self._read_again(offset, what, error)
                if again is not None:
                    failures[index - 1] = again
        return failures or None

    def _singly(self, batch: Sequence[Request], first: int, end: int, failures: Failures) -> None:
        """Do the requests from *first* to *end* one by one."""
        for index, error in (super().submit(batch[first:end]) or {}).items():
            failures[first + index] = error

    def _read_run(self, batch: Sequence[Request], first: int, failures: Failures) -> int:
        """Read requests that lie side by side in one call; return the index of the next one."""
        offset = batch[first][1]
        index, buffers = _adjacent(batch, first)
        try:
            done = _preadv(self.fd, buffers, offset)
        except (OSError, OverflowError):
            done = -1
        if done != batch[index - 1][1] + len(batch[index - 1][2]) - offset:
            self._singly(batch, first, index, failures)
        return index

    def _write_run(self, batch: Sequence[Request], first: int, failures: Failures) -> int:
        """Write requests that lie side by side in one call; return the index of the next one."""
        index, buffers = _adjacent(batch, first)
        try:
            self.write(batch[first][1], buffers)
        except CowhandError:
            # None of them has a result yet: singly, to blame the right one and to complete the others.
            self._singly(batch, first, index, failures)
        return index

    def _read_again(self, offset: int, what: Buffer, error: Exception) -> CowhandError | None:
        try:
            self.read_into(offset, what)
        except CowhandError as again:
            return again.with_traceback(error.__traceback__)
        return None


#: macOS has no fdatasync, and its fsync does not reach the medium, but that is what there is without F_FULLFSYNC on every flush.
_datasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def _behind(buffers: Sequence[Buffer], done: int) -> Iterator[memoryview]:
    """Yield views of *buffers* without their first *done* bytes."""
    for buffer in buffers:
        view = memoryview(buffer)
        if done < len(view):
            yield view[done:]
        done = max(0, done - len(view))


def _adjacent(batch: Sequence[Request], first: int) -> tuple[int, list[Buffer]]:
    """Return the index behind the requests from *first* on that are of one kind and lie side by side, and their buffers."""
    kind, offset, what = batch[first]
    buffers = [what]
    end = offset + len(what)
    index = first + 1
    while index < len(batch) and len(buffers) < MAX_BUFFERS:
        next_kind, offset, what = batch[index]
        if next_kind != kind or offset != end:
            break
        buffers.append(what)
        end += len(what)
        index += 1
    return index, buffers

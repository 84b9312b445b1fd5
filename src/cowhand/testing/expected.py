"""What a guest may find on its disk after a crash: for each sector the last flushed content, or any that was written later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from cowhand.testing.recorder import END_OF_LOG, Flush, Log

SECTOR = 512


class ContentLost(AssertionError):
    """A disk holds what no outcome of its history allows."""


class _Version:
    """One content of one sector (or one size of the disk). ``weak``: it may come, but never has to (a discard)."""

    __slots__ = ("content", "step", "weak")

    def __init__(self, content: bytes, step: _Step, weak: bool) -> None:
        self.content = content
        self.step = step
        self.weak = weak


class _Step:
    """One request of the guest: when it began and when it was acknowledged; ``firm`` steps are stable from then on by themselves."""

    __slots__ = ("begin", "end", "firm")

    def __init__(self, begin: int, firm: bool) -> None:
        self.begin = begin
        self.end: int | None = None
        self.firm = firm


class ExpectedContent:
    """The guest's side of a recorded workload. Wrap each request of the guest in the matching context manager.

    A request that raises may or may not have happened. Requests that overlap must not run at the same time; other threads' may. All
    offsets are multiples of 512: a guest's disk has sectors.
    """

    def __init__(self, log: Log, size: int, initial: bytes = b"") -> None:
        self._log = log
        self._initial = bytearray(initial.ljust(size, b"\0"))
        self._sectors: dict[int, list[_Version]] = {}
        self._flushes: list[Flush] = []
        self._sizes: list[tuple[_Step, int]] = [(self._step(True), size)]
        self._sizes[0][0].end = 0
        self.now = bytearray(self._initial)  #: the content without a crash, but for discards

    # -- what the guest does

    @contextmanager
    def writing(self, offset: int, data: bytes, *, fua: bool = False, weak: bool = False) -> Iterator[None]:
        """The guest writes *data*."""
        assert offset % SECTOR == 0
        assert len(data) % SECTOR == 0
        step = self._step(fua)
        for position in range(0, len(data), SECTOR):
            version = _Version(data[position : position + SECTOR], step, weak)
            self._sectors.setdefault((offset + position) // SECTOR, []).append(version)
        yield
        step.end = self._log.now()
        if not weak:
            self.now[offset : offset + len(data)] = data

    def zeroing(self, offset: int, length: int) -> AbstractContextManager[None]:
        """The guest writes zeroes."""
        return self.writing(offset, bytes(length))

    def discarding(self, offset: int, length: int) -> AbstractContextManager[None]:
        """The guest discards: the old content or zeroes from now on."""
        return self.writing(offset, bytes(length), weak=True)

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """The guest flushes: everything acknowledged before is stable when this ends well."""
        begin = self._log.now()
        yield
        self._flushes.append(Flush(begin, self._log.now()))

    @contextmanager
    def replacing(self, content: bytes) -> Iterator[None]:
        """The whole disk changes to *content* at once (a snapshot is applied); stable on return."""
        changed = bytearray(content)
        with self.resizing(len(content)), self.writing(0, content, fua=True):
            yield
        self.now = changed

    @contextmanager
    def resizing(self, size: int) -> Iterator[None]:
        """The disk is resized; stable on return. New bytes are zeroes."""
        old = len(self.now)
        step = self._step(True)
        self._sizes.append((step, size))
        for sector in range(size // SECTOR, old // SECTOR):
            self._sectors.setdefault(sector, []).append(_Version(bytes(SECTOR), step, False))
        yield
        step.end = self._log.now()
        self.now = self.now[:size].ljust(size, b"\0")

    def _step(self, firm: bool) -> _Step:
        return _Step(self._log.now(), firm)

    # -- what may be there

    def sizes(self, moment: int = END_OF_LOG) -> set[int]:
        """Return the sizes that the disk may have after a crash at *moment*."""
        allowed: set[int] = set()
        for step, size in self._sizes:
            if step.begin < moment:
                if step.end is not None and step.end < moment:
                    allowed.clear()
                allowed.add(size)
        return allowed

    def allowed(self, sector: int, moment: int = END_OF_LOG) -> set[bytes]:
        """Return the contents that *sector* may have after a crash at *moment*."""
        return self._allowed(sector, moment, self._horizon(moment))

    def _horizon(self, moment: int) -> int:
        return max((flush.begin for flush in self._flushes if flush.end < moment), default=0)

    def _allowed(self, sector: int, moment: int, horizon: int) -> set[bytes]:
        allowed = {bytes(self._initial[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")}
        for version in self._sectors.get(sector, ()):
            step = version.step
            if step.begin >= moment:
                break
            settled = step.end is not None and (step.end < horizon or (step.firm and step.end < moment))
            if settled and not version.weak:
                allowed.clear()
            allowed.add(version.content)
        return allowed

    def _permits(self, found: bytes, sector: int, moment: int, horizon: int) -> bool:
        """Tell whether *found* is in ``allowed``, newest contents first: thousands of sectors are asked for each crash."""
        for version in reversed(self._sectors.get(sector, ())):
            step = version.step
            if step.begin >= moment:
                continue
            if version.content == found:
                return True
            end = step.end
            if end is not None and not version.weak and (end < horizon or (step.firm and end < moment)):
                return False
        return bytes(self._initial[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0") == found

    def check(self, content: bytes, moment: int = END_OF_LOG) -> None:
        """Raise ContentLost unless *content*, the whole disk, may be what a crash at *moment* left."""
        sizes = self.sizes(moment)
        if len(content) not in sizes:
            raise ContentLost(f"the disk has {len(content)} bytes, not one of {sorted(sizes)}")
        horizon = self._horizon(moment)
        untouched = bytearray(content)
        initial = self._initial[: len(content)].ljust(len(content), b"\0")
        for sector in self._sectors:
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            found = content[place]
            if not found:
                continue
            if not self._permits(found, sector, moment, horizon):
                raise ContentLost(self._explain(sector, found, moment, horizon))
            untouched[place] = initial[place]
        if untouched != initial:
            at = next(i for i in range(0, len(initial), SECTOR) if untouched[i : i + SECTOR] != initial[i : i + SECTOR])
            raise ContentLost(
                f"sector {at // SECTOR} was never written, and holds {bytes(content[at : at + 16]).hex()}..."
            )

    def _explain(self, sector: int, found: bytes, moment: int, horizon: int) -> str:
        known = [version for version in self._sectors[sector] if version.content == found]
        if any(version.step.begin >= moment for version in known):
            origin = "written only later"
        elif known or found == self._initial[sector * SECTOR : (sector + 1) * SECTOR]:
            origin = "an older content, though a newer one was stable"
        else:
            origin = "zeroes that nobody wrote" if not any(found) else "never written there"
        allowed = len(self._allowed(sector, moment, horizon))
        return (
            f"sector {sector} holds {found[:16].hex()}..., {origin}; {allowed} contents are allowed at moment {moment}"
        )

"""Replay: from a recorder's log to every image that a power failure could have left.

The medium has a volatile cache: a change is stable when a flush that began after its acknowledgement has ended (or it had FUA); any other one
that had begun may be there, be missing, be there in another order, or be there in part. Parts are whole blocks of 512 or 4096
bytes, which media write atomically.

The images are copies that share pages, so a thousand of them cost little more than one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cowhand.block.protocols.memory import MemoryNode
from cowhand.testing.recorder import END_OF_LOG, RESIZE, Change, Log

#: Blocks that a medium writes wholly or not at all.
TORN_SIZES = (512, 4096)


class CrashState(NamedTuple):
    """One possible outcome: power failed at ``moment``, the medium then held ``image``. ``story`` tells how it came about.

    ``others`` are the other media of a log that tells of several.
    """

    image: MemoryNode
    moment: int
    story: str
    others: tuple[MemoryNode, ...] = ()


class _Media(list[MemoryNode]):
    """What each medium holds, by its number."""

    def copies(self) -> _Media:
        """Return copies, which share pages with these."""
        return _Media(image.copy() for image in self)

    def apply(self, change: Change) -> None:
        """Do *change* to its medium."""
        change.apply(self[change.medium])

    def state(self, moment: int, story: str) -> CrashState:
        """Return this outcome."""
        return CrashState(self[0], moment, story, tuple(self[1:]))


class _History:
    """The log, sorted, with the stable images of each window between flushes made once."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.changes = sorted(log.changes, key=lambda change: change.begin)
        self._stable: dict[tuple[int, ...], _Media] = {}

    def initial(self) -> _Media:
        """Return copies of what the media held before the first change."""
        return _Media(image.copy() for image in self.log.media)

    def moment_after(self, index: int) -> int:
        """Return the last moment at which no change after the *index*-th had begun."""
        return self.changes[index + 1].begin if index + 1 < len(self.changes) else END_OF_LOG

    def split(self, moment: int) -> tuple[_Media, list[Change]]:
        """Return what was surely stable at *moment*, as images not to be changed, and the changes that were not, in order."""
        horizons = tuple(self.log.horizon(moment, medium) for medium in range(len(self.log.media)))
        loose = [
            change
            for change in self.changes
            if change.begin < moment and not self._is_stable(change, horizons[change.medium], moment)
        ]
        images = self._stable.get(horizons)
        if images is None:
            images = self.initial()
            for change in self.changes:
                if change.end is not None and change.end < horizons[change.medium]:
                    images.apply(change)
            self._stable[horizons] = images
        forced = [c for c in self.changes if c.fua and c.end is not None and horizons[c.medium] <= c.end < moment]
        if forced:
            images = images.copies()
            for change in forced:
                images.apply(change)
        return images, loose

    @staticmethod
    def _is_stable(change: Change, horizon: int, moment: int) -> bool:
        if change.end is None:
            return False
        return change.end < horizon or (change.fua and change.end < moment)


def prefixes(log: Log) -> Iterator[CrashState]:
    """Yield the media as they were before the first change and after each one, all in order and complete."""
    history = _History(log)
    images = history.initial()
    first = history.changes[0].begin if history.changes else END_OF_LOG
    yield images.copies().state(first, "nothing written")
    for index, change in enumerate(history.changes):
        images.apply(change)
        yield images.copies().state(history.moment_after(index), f"all up to change {index} ({change})")


def torn(log: Log, sizes: Sequence[int] = TORN_SIZES, *, seed: int = 0) -> Iterator[CrashState]:
    """Yield, for each change that spans several blocks, the media with all before it and a part of its blocks: head, tail, random ones."""
    history = _History(log)
    rng = random.Random(seed)
    images = history.initial()
    for index, change in enumerate(history.changes):
        for size in sizes:
            blocks = _blocks(change, size)
            if len(blocks) < 2 or size < log.media[change.medium].limits.request_alignment:
                continue
            cut = rng.randrange(1, len(blocks))
            some = [block for block in blocks if rng.random() < 0.5]
            for name, chosen in (("head", blocks[:cut]), ("tail", blocks[cut:]), ("some blocks", some)):
                partial = images.copies()
                for block in chosen:
                    change.apply_part(partial[change.medium], block * size, (block + 1) * size)
                story = f"all before change {index}, and of it ({change}) the {name}: {len(chosen)} of {len(blocks)} x {size}"
                # Power failed while the change was under way: nothing that waited for its end has happened, and no later change had begun,
                # which another thread's may before it ends.
                moment = history.moment_after(index)
                if change.end is not None:
                    moment = min(moment, change.end)
                yield partial.state(moment, story)
        images.apply(change)


def singles(log: Log, *, limit: int | None = None, seed: int = 0) -> Iterator[CrashState]:
    """Yield, for each window between flushes at its end, the media with all but one of its changes, and with that one alone.

    This finds every pair of changes that needs an order and has none. *limit* bounds the number of windows' changes that are tried (drawn
    by *seed*); None tries all.
    """
    history = _History(log)
    candidates: list[tuple[int, int]] = []
    for moment in _window_ends(history):
        _, loose = history.split(moment)
        candidates += [(moment, position) for position in range(len(loose))]
    if limit is not None and len(candidates) > limit:
        candidates = sorted(random.Random(seed).sample(candidates, limit))
    for moment, position in candidates:
        base, loose = history.split(moment)
        chosen = loose[position]
        without = base.copies()
        for change in loose:
            if change is not chosen:
                without.apply(change)
        yield without.state(moment, f"at moment {moment} {chosen} alone was lost of {len(loose)} changes")
        alone = base.copies()
        alone.apply(chosen)
        yield alone.state(moment, f"at moment {moment} {chosen} alone survived of {len(loose)} changes")


def sampled(log: Log, count: int, *, seed: int = 0) -> Iterator[CrashState]:
    """Yield *count* outcomes drawn at random: a moment, a subset of what was not stable then, in any order, some of it torn."""
    history = _History(log)
    if not history.changes:
        return
    rng = random.Random(seed)
    moments = [change.begin for change in history.changes[1:]] + _window_ends(history)
    for number in range(count):
        moment = rng.choice(moments)
        base, loose = history.split(moment)
        images = base.copies()
        keep = rng.choice((0.1, 0.5, 0.5, 0.9))
        survivors = [change for change in loose if rng.random() < keep]
        shuffled = rng.random() < 0.5
        if shuffled:
            rng.shuffle(survivors)
        ripped = 0
        for change in survivors:
            ripped += _apply_maybe_torn(change, images[change.medium], rng)
        order = "in any order" if shuffled else "in order"
        story = (
            f"sample {number}: at moment {moment} {len(survivors)} of {len(loose)} loose changes {order}, {ripped} torn"
        )
        yield images.state(moment, story)


def crash_states(
    log: Log,
    *,
    samples: int = 200,
    torn_sizes: Sequence[int] = TORN_SIZES,
    single_limit: int | None = None,
    seed: int = 0,
) -> Iterator[CrashState]:
    """Yield every kind of outcome: each prefix, torn writes, each change lost or surviving alone, and *samples* random ones."""
    yield from prefixes(log)
    yield from torn(log, torn_sizes, seed=seed)
    yield from singles(log, limit=single_limit, seed=seed)
    yield from sampled(log, samples, seed=seed)


def replay(states: Iterator[CrashState], check: Callable[[CrashState], None]) -> int:
    """Hand each state to *check* and return how many there were; a failure's error gets the story of the state that it happened with.

    Of states that are equal in moment and media the first alone is checked: a quarter of those that :func:`crash_states` gives.
    """
    seen: set[tuple[int, ...]] = set()
    count = 0
    for state in states:
        count += 1
        key = (state.moment, *(hash(medium.snapshot_bytes()) for medium in (state.image, *state.others)))
        if key in seen:
            continue
        seen.add(key)
        try:
            check(state)
        except Exception as error:
            error.add_note(f"after a power failure: {state.story}")
            raise
    return count


def _window_ends(history: _History) -> list[int]:
    """Return the moments at which the most is loose: just before each flush ended, and the end of the log."""
    return [flush.end for flush in history.log.flushes] + [END_OF_LOG]


def _blocks(change: Change, size: int) -> range:
    if change.kind == RESIZE:
        return range(0)
    return range(change.offset // size, -(-(change.offset + change.length) // size))


def _apply_maybe_torn(change: Change, image: MemoryNode, rng: random.Random) -> bool:
    size = rng.choice(TORN_SIZES)
    blocks = _blocks(change, size)
    if rng.random() < 0.8 or len(blocks) < 2 or len(blocks) > 4096 or size < image.limits.request_alignment:
        change.apply(image)
        return False
    for block in blocks:
        if rng.random() < 0.5:
            change.apply_part(image, block * size, (block + 1) * size)
    return True

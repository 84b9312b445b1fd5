"""Named dirty bitmaps of one node: their states, what each state allows, successors, and the hook that keeps them.

States and texts are those of QEMU (``docs/interop/bitmaps``, ``qapi/block-core.json``: BlockDirtyInfo).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cowhand.bitmaps.bitmap import Bitmap
from cowhand.core.errors import BitmapUnusable, InvalidArgument


class DirtyBitmap:
    """A bitmap with a name and a state.

    ``enabled``: it follows writes. ``persistent``: the image keeps it. ``inconsistent``: it was not stored after the last writes, so it can only
    be removed. ``busy``: an operation holds it. ``read_only``: the image that keeps it cannot be written. Its states change only while
    no requests are in flight; its bits may change at any time.
    """

    __slots__ = ("_bits", "_source", "busy", "enabled", "inconsistent", "name", "persistent", "read_only", "successor")

    def __init__(
        self,
        name: str,
        bits: Bitmap,
        *,
        enabled: bool = True,
        persistent: bool = False,
        inconsistent: bool = False,
        read_only: bool = False,
        source: Callable[[Bitmap], None] | None = None,
    ) -> None:
        self.name = name
        self._bits = bits
        #: Sets in a bitmap what the image has stored of this one, and what is not in memory yet.
        self._source = source
        self.enabled = enabled
        self.persistent = persistent
        self.inconsistent = inconsistent
        self.read_only = read_only
        self.busy = False
        self.successor: Bitmap | None = None

    @property
    def granularity(self) -> int:
        """Bytes that one bit stands for."""
        return self._bits.granularity

    @property
    def size(self) -> int:
        """Bytes of the disk that the bitmap is of."""
        return self._bits.size

    @property
    def recent(self) -> Bitmap:
        """What was set since the bitmap was last stored, or all of it where :attr:`partial` is False."""
        return self._bits

    @property
    def partial(self) -> bool:
        """Whether a part of the bitmap is in the image alone, and not in memory."""
        return self._source is not None

    @property
    def bits(self) -> Bitmap:
        """All of the bitmap, read from the image if need be. Raises what reading raises; the caller has looked at the states."""
        if self._source is not None:
            self._source(self._bits)
            self._source = None
        return self._bits

    @property
    def recording(self) -> bool:
        """Whether writes are being recorded, in the bitmap itself or in its successor."""
        return (self.enabled or self.successor is not None) and not self.inconsistent

    def check(self, *, busy: bool = False, read_only: bool = False, inconsistent: bool = False) -> None:
        """Raise BitmapUnusable when a state forbids what is to be done; each state that is named is allowed."""
        if self.busy and not busy:
            raise BitmapUnusable(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if self.read_only and not read_only:
            raise BitmapUnusable(
                f"Bitmap '{self.name}' is readonly and cannot be modified",
                hint="Open its image for writing.",
                advice="",
            )
        if self.inconsistent and not inconsistent:
            raise BitmapUnusable(
                f"Bitmap '{self.name}' is inconsistent and cannot be used",
                hint="It was not stored when the image was last written. It can only be removed.",
                advice="Try block-dirty-bitmap-remove to delete this bitmap from disk",
            )

    def clear(self) -> None:
        """Forget everything, also what the image has stored."""
        self._source = None
        self._bits.clear()

    def replace(self, bits: Bitmap) -> None:
        """Make *bits*, of the same size, the content."""
        self._source = None
        self._bits = bits

    def resize(self, size: int) -> None:
        """Follow the disk to a new size."""
        if not self.inconsistent:
            self.bits.resize(size)
            if self.successor is not None:
                self.successor.resize(size)

    def info(self) -> dict[str, Any]:
        """Return QEMU's BlockDirtyInfo; ``count`` is in bytes."""
        out: dict[str, Any] = {
            "name": self.name,
            "count": 0 if self.inconsistent else self.bits.count() * self.granularity,
            "granularity": self.granularity,
            "recording": self.recording,
            "busy": self.busy,
            "persistent": self.persistent,
        }
        if self.inconsistent:
            out["inconsistent"] = True
        return out

    def __repr__(self) -> str:
        states = [
            name for name in ("enabled", "persistent", "inconsistent", "busy", "read_only") if getattr(self, name)
        ]
        return f"<DirtyBitmap {self.name!r} granularity={self.granularity} {' '.join(states)}>"


class _Marks:
    """Calls all of ``parts``, a list that may change."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[Callable[[int, int], None]]) -> None:
        self.parts = parts

    def __call__(self, offset: int, length: int) -> None:
        for part in self.parts:
            part(offset, length)


class BitmapSet:
    """The named bitmaps of one node, in the order in which they came.

    ``mark(offset, length)`` is the node's after-write hook: it sets that range in all bitmaps that follow writes. ``mark.parts`` are theirs, in a
    list that changes with them.
    """

    __slots__ = ("_active", "_named", "mark")

    def __init__(self) -> None:
        self._named: dict[str, DirtyBitmap] = {}
        self._active: list[Callable[[int, int], None]] = []
        self.mark = _Marks(self._active)

    def __iter__(self) -> Iterator[DirtyBitmap]:
        return iter(list(self._named.values()))

    def __len__(self) -> int:
        return len(self._named)

    def get(self, name: str) -> DirtyBitmap | None:
        """Return the bitmap *name*, or None."""
        return self._named.get(name)

    @property
    def active(self) -> bool:
        """Whether any bitmap follows writes."""
        return bool(self._active)

    def add(self, bitmap: DirtyBitmap, *, refresh: bool = True) -> None:
        """Add *bitmap*; without *refresh* the caller calls that after the last of many. Raises InvalidArgument where its name is taken."""
        if bitmap.name in self._named:
            raise InvalidArgument(
                f"Bitmap already exists: {bitmap.name}", hint="Choose another name, or remove that one."
            )
        self._named[bitmap.name] = bitmap
        if refresh:
            self.refresh()

    def remove(self, name: str) -> None:
        """Forget the bitmap *name*."""
        self.forget(name)
        self.refresh()

    def forget(self, name: str) -> None:
        """The same for one of many: the caller calls :meth:`refresh` after the last."""
        del self._named[name]

    def refresh(self) -> None:
        """Learn anew which bitmaps follow writes; called when the state of one has changed."""
        active = [bitmap.recent for bitmap in self if bitmap.enabled and not bitmap.inconsistent]
        active += [bitmap.successor for bitmap in self if bitmap.successor is not None]
        self._active[:] = [bits.marker() for bits in active]

    def resize(self, size: int) -> None:
        """Follow the disk to a new size."""
        for bitmap in self:
            if bitmap.size != size:
                bitmap.resize(size)

    # -- successors: an operation reads a bitmap that stands still, while a new one takes the writes

    def freeze(self, bitmap: DirtyBitmap) -> None:
        """Give *bitmap* a successor that takes the writes (if it was enabled) until :meth:`abdicate` or :meth:`reclaim`; it is busy so long."""
        bitmap.check()
        if bitmap.successor is not None:
            raise BitmapUnusable("Cannot create a successor for a bitmap that already has one")
        bits = bitmap.bits
        if bitmap.enabled:
            bitmap.successor = Bitmap(bits.size, bits.granularity)
            bitmap.enabled = False
        bitmap.busy = True
        self.refresh()

    def abdicate(self, bitmap: DirtyBitmap) -> None:
        """End :meth:`freeze`: what was written meanwhile is all that *bitmap* holds now."""
        self._thaw(bitmap, keep=False)

    def reclaim(self, bitmap: DirtyBitmap) -> None:
        """End :meth:`freeze` of an operation that failed: what was written meanwhile is added to what *bitmap* held."""
        self._thaw(bitmap, keep=True)

    def _thaw(self, bitmap: DirtyBitmap, *, keep: bool) -> None:
        if not bitmap.busy:
            raise BitmapUnusable("Cannot relinquish control if there's no successor present")
        successor, bitmap.successor = bitmap.successor, None
        bitmap.busy = False
        if successor is None:
            if not keep:
                bitmap.clear()
        else:
            bitmap.enabled = True
            if keep:
                bitmap.bits.merge(successor)
            else:
                bitmap.replace(successor)
        self.refresh()

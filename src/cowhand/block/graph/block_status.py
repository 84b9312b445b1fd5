"""What a chain of layers is made of: the one walker over single layers' answers.

Follows QEMU's rules of block status: a layer answers for itself; where it allocates nothing, its backing file does, one level deeper; where
the backing file ends, or there is none, the bytes read as zeroes in the layer above.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

from cowhand.block.node.node import BlockNode
from cowhand.core.errors import CowhandError
from cowhand.core.extents import DATA, MAX_ROWS, OFFSET, RECURSE, ZERO, Extent, ExtentBatch

_CONTENT = DATA | ZERO
SECTOR = 512


def layered(node: BlockNode, offset: int, length: int, depth: int | None = None) -> ExtentBatch:
    """Describe ``[offset, offset + length)``, or its beginning, through at most *depth* layers (None: all).

    Rows tell their layer in ``depth``. Rows that no asked layer allocates have neither DATA nor ZERO, unless there is nothing below.
    """
    top = node.map_batch(offset, length)  # through its filters, which may refuse
    here = skip_filters(node)
    out = _alone(here, top)
    if out is None:
        out, ahead = ExtentBatch(), _Ahead(top.end)
        for row in top:
            if not _resolve(out, here, row, 0, depth, ahead):
                break
    return out


def _alone(here: BlockNode, top: ExtentBatch) -> ExtentBatch | None:
    """Return what *top*, the answer of layer *here*, says where nobody else has to be asked; None where somebody has to be. A column at a time."""
    kinds = set(top.flags)
    if len(top) > MAX_ROWS or any(top.depth) or any(flags & RECURSE for flags in kinds):
        return None
    empty = {flags for flags in kinds if not flags & _CONTENT}
    if not empty:
        return top
    if here.backing is not None:
        return None
    out = ExtentBatch()
    out.start, out.length, out.host, out.depth, out.nodes = top.start, top.length, top.host, top.depth, [*top.nodes]
    implied = _implied(here)
    meaning = {flags: flags | implied if flags in empty else flags for flags in kinds}
    out.flags = array("H", [meaning[flags] for flags in top.flags])
    own = out.index_of(here)
    placeless = {flags for flags in empty if not flags & OFFSET}
    pairs = zip(top.flags, top.node, strict=True)
    out.node = array("H", [own if flags in placeless else node for flags, node in pairs])
    return out


def _implied(here: BlockNode) -> int:
    """Return how what *here* does not allocate reads with no layer below. QEMU says of it: zero, and of no layer's doing."""
    return ZERO if here.supports_backing else DATA


def skip_filters(node: BlockNode) -> BlockNode:
    """Return the first node at or below *node* that is not a filter."""
    while node.is_filter:
        primary = node.primary
        if primary is None:
            break
        node = primary.node
    return node


def _resolve(out: ExtentBatch, node: BlockNode, row: Extent, level: int, depth: int | None, ahead: _Ahead) -> bool:
    """Add *row* of *node*'s own answer to *out*, asking further down where it says nothing; False when *out* is full."""
    # A stack instead of recursion: a chain may be longer than Python's.
    stack: list[tuple[BlockNode, Extent, int]] = [(node, row, level)]
    while stack:
        if len(out) >= MAX_ROWS:
            return False
        here, part, at = stack.pop()
        if part.flags & _CONTENT:
            if part.flags & RECURSE and part.flags & OFFSET:
                if not _ask_file(out, part, at, ahead):
                    return False
            else:
                out.add(part.start, part.length, part.flags & ~RECURSE, part.host, part.node, at)
            continue
        below = here.backing
        if below is None:
            out.add(part.start, part.length, part.flags | _implied(here), part.host, _owner(part, here), at)
            continue
        lower = below.node
        limit = lower.size
        if limit <= part.start < -(-limit // SECTOR) * SECTOR:
            # A file that ends inside a sector reads on as zeroes up to the sector's end, and is what says so.
            count = min(part.length, -limit % SECTOR - (part.start - limit))
            if not _fill_sector(out, lower, part, count, at + 1):
                return False
            if count < part.length:
                stack.append((here, _behind(part, count), at))
            continue
        if part.start >= limit:
            out.add(part.start, part.length, part.flags | ZERO, part.host, _owner(part, here), at)
            continue
        if depth is not None and at + 1 >= depth:
            count = min(part.length, limit - part.start)
            out.add(part.start, count, part.flags, part.host, _owner(part, here), at)
            if count < part.length:
                rest = _behind(part, count)
                stack.append((here, rest, at))
            continue
        count = min(part.length, limit - part.start)
        answers = ahead.rows(lower, part.start, part.start + count, layer=True)
        told = answers.end - part.start
        if told < part.length:
            stack.append((here, _behind(part, told), at))
        layer = skip_filters(lower)
        stack.extend((layer, answer, at + 1) for answer in reversed(list(answers)))
    return True


def _fill_sector(out: ExtentBatch, lower: BlockNode, part: Extent, count: int, level: int) -> bool:
    """Add *count* zero bytes behind the end of *lower*, which go on where its last byte lies. False: *out* is full."""
    if len(out) >= MAX_ROWS:
        return False
    last = next(iter(lower.map_batch(lower.size - 1, 1)))
    host = last.host + 1 + part.start - lower.size if last.flags & OFFSET else last.host
    out.add(part.start, count, last.flags & ~(DATA | RECURSE) | ZERO, host, last.node, level)
    return True


class _Ahead:
    """Asks nodes for more than is wanted just now, and keeps the answer, as long as that pays: what lies about asks again and again.

    *limit*: where the top's answer ends, behind which no layer has to be asked. One thread uses it, for one answer.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._windows: dict[int, _Window] = {}

    def rows(self, node: BlockNode, offset: int, end: int, *, layer: bool) -> ExtentBatch:
        """Return what *node*, a *layer* or a file below one, says of *offset* and what follows, at least one row and not past *end*."""
        window = self._windows.get(id(node))
        if window is None:
            window = self._windows[id(node)] = _Window(node, min(self._limit, node.size) if layer else node.size)
        return window.rows(offset, end)


class _Window:
    """The part of a node that is known."""

    #: bytes that are asked for together: more, as long as they are needed
    _LEAST, _MOST = 64 << 10, 1 << 40

    def __init__(self, node: BlockNode, limit: int) -> None:
        self._node = node
        self._limit = limit
        self._known = ExtentBatch()
        self._length = self._LEAST // 4
        self._used = 0  #: rows of what is known that were wanted

    def rows(self, offset: int, end: int) -> ExtentBatch:
        """Return what the node says of *offset* and what follows, at least one row and not past *end*."""
        if not self._known.begin <= offset < self._known.end:
            self._look(offset, end)
        known = self._known
        out = ExtentBatch()
        for at in range(bisect_right(known.start, offset) - 1, len(known)):
            start = max(known.start[at], offset)
            stop = min(known.start[at] + known.length[at], end)
            if start >= stop:
                break
            flags, host = known.flags[at], known.host[at]
            place = host + start - known.start[at] if flags & OFFSET else host
            out.add(start, stop - start, flags, place, known.nodes[known.node[at]])
        self._used += len(out)
        return out

    def _look(self, offset: int, end: int) -> None:
        """Know of *offset*, and of more when what was known before was not known in vain."""
        known = self._known
        pays = self._used * 8 >= len(known)
        self._length = min(self._length * 4, self._MOST) if pays else max(self._length // 4, self._LEAST)
        self._used = 0
        # What goes on begins here: a window may end after so many rows that it comes no further than one before.
        goes_on = 0 <= offset - known.end <= self._length
        for begin in (offset - offset % (self._LEAST if goes_on else self._length), offset):
            try:
                known = self._node.map_batch(begin, max(min(begin + self._length, self._limit), end) - begin)
            except CowhandError:
                break  # nobody asked for all of this: what is damaged may be hidden by a layer above
            if known.end > offset:
                self._known = known
                return
            self._length = self._LEAST
        self._length = self._LEAST
        self._known = self._node.map_batch(offset, end - offset)


def _ask_file(out: ExtentBatch, part: Extent, level: int, ahead: _Ahead) -> bool:
    """Add a row of preallocated data, split by the holes that the file below tells of; its offsets stay the format's. False: *out* is full."""
    position = part.host
    end = part.host + part.length
    flags = part.flags & ~RECURSE
    limit = part.node.size
    while position < end:
        if position >= limit:
            out.add(part.start + position - part.host, end - position, flags | ZERO, position, part.node, level)
            break
        answer = ahead.rows(part.node, position, min(end, limit), layer=False)
        for row in answer:
            if len(out) >= MAX_ROWS:
                return False
            extra = ZERO if row.flags & ZERO else 0
            out.add(part.start + row.start - part.host, row.length, flags | extra, row.start, part.node, level)
        position = answer.end
    return True


def _owner(part: Extent, here: BlockNode) -> BlockNode:
    """Return the node of a row that *here* allocates nothing of; it may have a place all the same."""
    owner: BlockNode = part.node if part.flags & OFFSET else here
    return owner


def _behind(part: Extent, count: int) -> Extent:
    """Return *part* without its first *count* bytes."""
    host = part.host + count if part.flags & OFFSET else part.host
    return part._replace(start=part.start + count, length=part.length - count, host=host)

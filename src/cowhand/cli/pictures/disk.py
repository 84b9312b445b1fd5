"""The picture of one disk: what it is made of, and where on the disk each kind of space lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cowhand.cli.pictures.raster import Kind, Raster, in_order, kind_of
from cowhand.cli.pictures.svg import Picture, Theme, shorten
from cowhand.core.extents import ExtentBatch
from cowhand.core.units import format_size

WIDTH = 960.0
MARGIN = 28.0
#: Left of the rows stand their offsets.
GUTTER = 84.0
#: Cells of one row; each is four pixels wide.
COLUMNS = 205
ROW_HEIGHT = 22.0
ROW_GAP = 7.0
#: A disk is drawn in at most so many rows.
MAX_ROWS = 16
#: No cell stands for less than a sector.
_SMALLEST_ROW = 512 * COLUMNS
_LEGEND_COLUMN = 292.0


def row_bytes(size: int) -> int:
    """Return how many bytes one row of the picture stands for: a power of two, so that the offsets beside the rows are round."""
    length = 1 << (_SMALLEST_ROW - 1).bit_length()
    while length * MAX_ROWS < size:
        length *= 2
    return length


def kind_label(kind: Kind, layers: Sequence[str]) -> str:
    """Return what a legend says of *kind*; *layers* names the layers, the active one first."""
    if kind.what == "zero":
        return "zeroes, nothing stored"
    if kind.what == "unallocated":
        return "never written"
    name = layers[kind.depth] if kind.depth < len(layers) else f"layer {kind.depth}"
    return f"{name}, compressed" if kind.what == "compressed" else name


def picture(
    batches: Iterable[ExtentBatch],
    size: int,
    *,
    title: str,
    subtitle: str = "",
    layers: Sequence[str] = (),
    theme: Theme = "auto",
) -> str:
    """Return an SVG of a disk of *size* bytes that is made of *batches*; *layers* names the images of its chain, the active one first.

    Each column of the map stands for the same number of bytes; its height is shared by the kinds of space in proportion.
    """
    each = row_bytes(size)
    rows = max(1, -(-size // each))
    lengths = [min(each, size - row * each) for row in range(rows)]
    # One raster for each row: so cells of all rows are equally long, and offsets beside the rows are exact.
    rasters = [Raster(length, max(1, round(COLUMNS * length / each))) for length in lengths]
    totals: dict[Kind, int] = {}
    for batch in batches:
        whole = Raster(size, 1).add_batches([batch])
        for kind, count in whole.totals.items():
            totals[kind] = totals.get(kind, 0) + count
        _spread(batch, rasters, each, size)
    out = Picture(WIDTH, theme)
    y = _heading(out, title, subtitle)
    y = _composition(out, y, totals, size, layers)
    y = _legend(out, y, totals, size, layers)
    y = _rows(out, y, rasters, each, layers)
    stored = sum(count for kind, count in totals.items() if kind.what in ("data", "compressed"))
    return out.render(
        y + MARGIN - ROW_GAP, title, f"A disk of {format_size(size)}, of which {format_size(stored)} hold data."
    )


def _spread(batch: ExtentBatch, rasters: Sequence[Raster], each: int, size: int) -> None:
    for start, length, flags, depth in zip(batch.start, batch.length, batch.flags, batch.depth, strict=True):
        kind = kind_of(flags, depth)
        end = min(start + length, size)
        while start < end:
            row = start // each
            border = min(end, (row + 1) * each)
            rasters[row].add(start - row * each, border - start, kind)
            start = border


def _heading(out: Picture, title: str, subtitle: str) -> float:
    out.text(MARGIN, 44, shorten(title, WIDTH - 2 * MARGIN, 20), size=20, bold=True)
    if subtitle:
        out.text(MARGIN, 68, shorten(subtitle, WIDTH - 2 * MARGIN, 13), size=13, fill="quiet")
    return 88.0 if subtitle else 64.0


def _composition(out: Picture, y: float, totals: dict[Kind, int], size: int, layers: Sequence[str]) -> float:
    width = WIDTH - 2 * MARGIN
    with out.window(MARGIN, y, width, 16, 8):
        out.rect(MARGIN, y, width, 16, "none")
        x = MARGIN
        for kind in in_order(totals):
            length = width * totals[kind] / size if size else 0
            out.space(x, y, length, 16, kind, title=kind_label(kind, layers))
            x += length
    return y + 16 + 24


def _legend(out: Picture, y: float, totals: dict[Kind, int], size: int, layers: Sequence[str]) -> float:
    kinds = in_order(totals)
    for index, kind in enumerate(kinds):
        x = MARGIN + (index % 3) * (_LEGEND_COLUMN + 14)
        line = y + (index // 3) * 38
        with out.window(x, line - 10, 12, 12, 3):
            out.space(x, line - 10, 12, 12, kind)
        out.rect(x, line - 10, 12, 12, "empty", stroke="edge", radius=3)
        out.text(x + 20, line, shorten(kind_label(kind, layers), _LEGEND_COLUMN - 24, 13), size=13)
        share = f"{format_size(totals[kind])} · {percent(totals[kind], size)}"
        out.text(x + 20, line + 16, share, size=12, fill="quiet")
    lines = -(-len(kinds) // 3)
    return y + lines * 38 + 6


def percent(part: int, whole: int) -> str:
    """Return *part* of *whole* as people write it: nothing that exists is "0 %", and only all of it is "100 %"."""
    if not whole or part == whole:
        return "100 %"
    share = 100 * part / whole
    if share < 0.1:
        return "under 0.1 %" if part else "0 %"
    if share > 99.9:
        return "over 99.9 %"
    return f"{share:.1f} %" if share < 10 or share > 99 else f"{share:.0f} %"


def _rows(out: Picture, y: float, rasters: Sequence[Raster], each: int, layers: Sequence[str]) -> float:
    cell_width = (WIDTH - 2 * MARGIN - GUTTER) / COLUMNS
    left = MARGIN + GUTTER
    for row, raster in enumerate(rasters):
        out.text(
            left - 12, y + ROW_HEIGHT / 2 + 4, offset_label(row * each), size=11, fill="quiet", mono=True, anchor="end"
        )
        width = cell_width * len(raster.cells)
        with out.window(left, y, width, ROW_HEIGHT, 4):
            out.rect(left, y, width, ROW_HEIGHT, "none")
            draw_cells(out, raster, left, y, width, ROW_HEIGHT, row * each, layers)
        out.rect(left, y, width, ROW_HEIGHT, "empty", stroke="edge", radius=4)
        y += ROW_HEIGHT + ROW_GAP
    return y


def exact(offset: int) -> str:
    """Return an offset in one unit, with as many digits as tell neighbouring cells apart."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if offset >= unit:
            return f"{offset / unit:.3f}".rstrip("0").rstrip(".") + f" {name}"
    return f"{offset} B"


def offset_label(offset: int) -> str:
    """Return an offset for the edge of a picture: "0", "64 MiB"."""
    return format_size(offset) if offset else "0"


def draw_cells(
    out: Picture, raster: Raster, x: float, y: float, width: float, height: float, base: int, layers: Sequence[str]
) -> None:
    """Draw *raster* into a box; each cell is a stack of its kinds, data at the bottom. Equal neighbours become one rectangle.

    *base* is added to the offsets in hover texts.
    """
    shares = [_stack(cell) for cell in raster.cells]
    step = width / len(shares)
    begin = 0
    while begin < len(shares):
        end = begin + 1
        while end < len(shares) and shares[end] == shares[begin]:
            end += 1
        first, last = base + raster.begin_of(begin), base + raster.begin_of(end)
        bottom = y + height
        for kind, share in shares[begin]:
            tall = height * share / _STEPS
            bottom -= tall
            if kind.what == "unallocated":
                continue
            text = f"{exact(first)} to {exact(last)}: {kind_label(kind, layers)}"
            out.space(x + begin * step, bottom, (end - begin) * step, tall, kind, title=text)
        begin = end


#: A cell's height is shared out in so many steps, so that cells that look alike can be drawn together.
_STEPS = 22


def _stack(cell: dict[Kind, int]) -> tuple[tuple[Kind, int], ...]:
    total = sum(cell.values())
    if not total:
        return ()
    kinds = in_order(cell)
    # Whatever is there is seen, be it a single sector; the largest kind gives what rounding takes.
    steps = {kind: max(1, cell[kind] * _STEPS // total) for kind in kinds}
    largest = max(kinds, key=lambda kind: cell[kind])
    steps[largest] += _STEPS - sum(steps.values())
    return tuple((kind, steps[kind]) for kind in kinds)

"""A disk as a bar of characters: coloured blocks on a terminal, letters elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowhand.cli.output import Output, printable
from cowhand.cli.pictures import palette
from cowhand.cli.pictures.disk import kind_label, percent
from cowhand.cli.pictures.raster import Kind, Raster, in_order
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from rich.text import Text

#: Blocks of one to eight eighths of a cell's height.
_EIGHTHS = "▁▂▃▄▅▆▇█"
_ROWS = 4
_DEFAULT_WIDTH = 80


def colour_of(kind: Kind) -> str:
    """Return the terminal's colour of *kind*."""
    if kind.what == "zero":
        return palette.ZERO.terminal
    return palette.UNALLOCATED.terminal if kind.what == "unallocated" else palette.layer(kind.depth).terminal


def glyph(cell: dict[Kind, int], *, colour: bool) -> tuple[str, Kind]:
    """Return the character for *cell* and the kind that colours it: its largest kind of data, as high as its share; else what there is."""
    stored = {kind: count for kind, count in cell.items() if kind.what in ("data", "compressed")}
    if not stored:
        kind = max(cell, key=lambda one: cell[one], default=Kind("unallocated"))
        return ("░" if colour else "z", kind) if kind.what == "zero" else ("·", kind)
    kind = max(stored, key=lambda one: stored[one])
    if not colour:
        return ("c" if kind.what == "compressed" else str(min(kind.depth, 9))), kind
    share = sum(stored.values()) / sum(cell.values())
    if kind.what == "compressed":
        return "▒", kind
    return _EIGHTHS[min(7, max(0, round(share * 8) - 1))], kind


def draw(raster: Raster, layers: Sequence[str], out: Output) -> None:
    """Print *raster* as rows of characters, and a legend with sizes."""
    width = _width(out)
    lines = [raster.cells[begin : begin + width] for begin in range(0, len(raster.cells), width)]
    for number, cells in enumerate(lines):
        label = format_size(raster.begin_of(number * width)) if number else "0"
        pairs = [glyph(cell, colour=out.rich) for cell in cells]
        if not out.rich:
            out.line(f"{label:>9} {''.join(text for text, _ in pairs)}")
            continue
        from rich.text import Text

        row = Text.assemble((f"{label:>9} ", "dim"))
        for colour, group in itertools.groupby(pairs, key=lambda pair: colour_of(pair[1])):
            row.append("".join(text for text, _ in group), style=colour)
        out.console.print(row, no_wrap=True, crop=True)
    out.line()
    for kind in in_order(raster.totals):
        _legend(kind, raster, layers, out)


def _legend(kind: Kind, raster: Raster, layers: Sequence[str], out: Output) -> None:
    amount = raster.totals[kind]
    mark, _ = glyph({kind: 1}, colour=out.rich)
    share = percent(amount, raster.size)
    label = printable(kind_label(kind, layers))
    if not out.rich:
        out.line(f"{mark:>9} {format_size(amount):>9}  {share:>12}  {label}")
        return
    from rich.text import Text

    line: Text = Text.assemble(
        (f"{mark * 2:>9} ", colour_of(kind)), f"{format_size(amount):>9}  ", (f"{share:>12}  ", "dim"), label
    )
    out.console.print(line, soft_wrap=True)


def _width(out: Output) -> int:
    columns = out.console.width if out.rich else _DEFAULT_WIDTH
    return max(10, min(columns, 160) - 10)


def raster_for(size: int, out: Output) -> Raster:
    """Return an empty raster that fills some rows of the terminal."""
    cells = _width(out) * _ROWS
    return Raster(size, max(1, min(cells, -(-size // 512))))

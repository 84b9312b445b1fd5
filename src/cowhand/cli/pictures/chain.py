"""The picture of a chain: its layers from the active one down to the base, what each stores, and who else depends on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cowhand.cli.pictures.disk import draw_cells, percent
from cowhand.cli.pictures.raster import Kind, Raster, kind_of
from cowhand.cli.pictures.svg import Picture, Theme, layer_class, shorten
from cowhand.core.extents import ExtentBatch
from cowhand.core.units import format_size

WIDTH = 960.0
MARGIN = 28.0
CARD_WIDTH = 604.0
#: Where the other overlays stand, right of the cards.
ASIDE = MARGIN + CARD_WIDTH + 56
GAP = 46.0
_PAD = 22.0
_BAR = 18.0
#: Width of a cell of a layer's bar.
_CELL = 2.0
_PILL = 20.0
_PILLS_SHOWN = 6
_OTHERS_SHOWN = 5
_OTHER_HEIGHT = 30.0


class LayerDrawing(NamedTuple):
    """What is drawn of one layer. ``batches``: its own extents only (depth 0), or empty when it could not be read.

    ``stored``: bytes that its file takes; ``visible``: bytes of the active disk that are read from this layer, None if unknown.
    ``others``: overlays of this layer outside the chain. ``note``: what is wrong with it ("" when nothing is).
    """

    name: str
    format: str
    virtual_size: int
    stored: int | None = None
    visible: int | None = None
    batches: Iterable[ExtentBatch] = ()
    snapshots: Sequence[str] = ()
    others: Sequence[str] = ()
    note: str = ""


def picture(layers: Sequence[LayerDrawing], *, title: str, subtitle: str = "", theme: Theme = "auto") -> str:
    """Return an SVG of a chain; *layers* begins with the active one. Bars are to one scale: that of the longest layer."""
    out = Picture(WIDTH, theme)
    out.text(MARGIN, 44, shorten(title, WIDTH - 2 * MARGIN, 20), size=20, bold=True)
    y = 64.0
    if subtitle:
        out.text(MARGIN, 68, shorten(subtitle, WIDTH - 2 * MARGIN, 13), size=13, fill="quiet")
        y = 92.0
    scale = max((layer.virtual_size for layer in layers), default=0)
    whole = layers[0].virtual_size if layers else 0
    # Cards leave room beside them only where something stands there.
    wide = CARD_WIDTH if any(layer.others for layer in layers) else WIDTH - 2 * MARGIN
    bottom = y
    for depth, layer in enumerate(layers):
        if depth:
            y += GAP
            _arrow(out, bottom, y)
        height = _card(out, y, depth, layer, scale, whole, wide)
        bottom = y + height
        y += max(height, _others(out, y, height, layer.others))
    names = ", which reads through to ".join(layer.name for layer in layers)
    return out.render(y + MARGIN, title, names)


def _arrow(out: Picture, begin: float, end: float) -> None:
    x = MARGIN + 40
    out.path(f"M{x} {begin + 4}V{end - 6}", stroke="quiet")
    out.path(f"M{x - 5} {end - 12}L{x} {end - 6}L{x + 5} {end - 12}", stroke="quiet")
    out.text(x + 16, (begin + end) / 2 + 4, "what it does not store is read from", size=12, fill="quiet")


def _card(out: Picture, y: float, depth: int, layer: LayerDrawing, scale: int, whole: int, wide: float) -> float:
    pills = bool(layer.snapshots)
    height = 2 * _PAD + (66 if layer.virtual_size and not layer.note else 34) + (_PILL + 14 if pills else 0)
    inner = wide - 2 * _PAD
    x = MARGIN + _PAD
    out.rect(
        MARGIN,
        y,
        wide,
        height,
        "card",
        stroke="alarm" if layer.note else "edge",
        radius=10,
        dashed=bool(layer.note),
    )
    with out.window(MARGIN, y, wide, height, 10):
        out.rect(MARGIN, y, 6, height, layer_class(depth))
    line = y + _PAD + 12
    out.text(x, line, shorten(layer.name, inner - 150, 15), size=15, bold=True)
    place = "active layer" if not depth else f"layer {depth}"
    out.text(MARGIN + wide - _PAD, line, place, size=12, fill="quiet", anchor="end")
    facts = [layer.format]
    if layer.virtual_size:
        facts.append(f"disk of {format_size(layer.virtual_size)}")
    if layer.stored is not None:
        facts.append(f"{format_size(layer.stored)} on disk")
    if layer.visible is not None:
        facts.append(f"{format_size(layer.visible)} ({percent(layer.visible, whole)}) seen from the top")
    out.text(x, line + 22, layer.note or " · ".join(facts), size=12.5, fill="alarm" if layer.note else "quiet")
    bar = line + 36
    width = inner * layer.virtual_size / scale if scale else 0
    if width and not layer.note:
        _bar(out, x, bar, width, depth, layer)
    if pills:
        _pills(out, x, bar + _BAR + 14, inner, layer.snapshots)
    return height


def _bar(out: Picture, x: float, y: float, width: float, depth: int, layer: LayerDrawing) -> None:
    raster = Raster(layer.virtual_size, max(1, round(width / _CELL)))
    for batch in layer.batches:
        for start, length, flags in zip(batch.start, batch.length, batch.flags, strict=True):
            kind = kind_of(flags, depth)
            raster.add(start, length, kind if kind.what != "unallocated" else Kind("unallocated"))
    with out.window(x, y, width, _BAR, 4):
        out.rect(x, y, width, _BAR, "none")
        draw_cells(out, raster, x, y, width, _BAR, 0, [""] * depth + [layer.name])
    out.rect(x, y, width, _BAR, "empty", stroke="edge", radius=4)


def _pills(out: Picture, x: float, y: float, width: float, names: Sequence[str]) -> None:
    out.text(x, y + 14, "snapshots", size=11.5, fill="quiet")
    at = x + 68
    for index, name in enumerate(names):
        text = shorten(name, 150, 11.5)
        wide = len(text) * 6.7 + 18
        left = len(names) - index
        if at + wide > x + width - (30 if left > 1 else 0) or index == _PILLS_SHOWN:
            out.text(at + 2, y + 14, f"+{left}", size=11.5, fill="quiet")
            return
        out.rect(at, y, wide, _PILL, "ground", stroke="edge", radius=_PILL / 2)
        out.text(at + wide / 2, y + 14, text, size=11.5, anchor="middle")
        at += wide + 8


def _others(out: Picture, y: float, card_height: float, names: Sequence[str]) -> float:
    """Draw the overlays that also depend on a layer; return how far down they reach."""
    if not names:
        return 0
    shown = list(names[:_OTHERS_SHOWN])
    if len(names) > len(shown):
        shown[-1] = f"and {len(names) - len(shown) + 1} more"
    out.text(ASIDE, y + 12, "other overlays of this layer", size=12, fill="quiet")
    edge = MARGIN + CARD_WIDTH
    middle = y + min(card_height, 22 + _OTHER_HEIGHT) / 2 + 14
    for index, name in enumerate(shown):
        top = y + 22 + index * (_OTHER_HEIGHT + 8)
        centre = top + _OTHER_HEIGHT / 2
        out.path(
            f"M{ASIDE} {centre}C{ASIDE - 30} {centre} {edge + 30} {middle} {edge + 3} {middle}",
            stroke="quiet",
            dashed=True,
        )
        out.rect(ASIDE, top, WIDTH - MARGIN - ASIDE, _OTHER_HEIGHT, "card", stroke="edge", radius=8)
        out.text(ASIDE + 12, centre + 4.5, shorten(name, WIDTH - MARGIN - ASIDE - 24, 13), size=13)
    return 22 + len(shown) * (_OTHER_HEIGHT + 8)

"""SVG text, element by element. Colours are written as attributes for a light ground and, for viewers that know media queries, as
style rules for a dark one, so that a picture is legible in both and also in viewers that know neither.

Specification: SVG 1.1 (2nd edition).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Literal

from cowhand.cli.pictures import palette
from cowhand.cli.pictures.palette import Shade
from cowhand.cli.pictures.raster import Kind

Theme = Literal["auto", "light", "dark"]

SANS = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'Liberation Mono', 'DejaVu Sans Mono', monospace"

#: What XML 1.0 does not allow in text (section 2.2), and lone surrogates of undecodable file names.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
#: Stands for a picture's own prefix of ids until its content is known; no cleaned text holds it.
_OWN = "\x00"
_SHADES = {
    "ground": palette.GROUND,
    "card": palette.CARD,
    "edge": palette.EDGE,
    "ink": palette.INK,
    "quiet": palette.QUIET,
    "alarm": palette.ALARM,
    "zero": palette.ZERO,
    "none": palette.UNALLOCATED,
    "deeper": palette.DEEPER,
    **{f"layer{depth}": shade for depth, shade in enumerate(palette.LAYERS)},
}


def clean(text: str) -> str:
    """Return *text* with what XML cannot hold, or what steers terminals, replaced, and escaped for text and attributes."""
    return escape(_FORBIDDEN.sub("�", text), quote=True)


def shorten(text: str, width: float, size: float) -> str:
    """Return *text*, cut in the middle where it is wider than about *width* pixels at *size* pixels a letter's height."""
    room = max(8, int(width / (size * 0.56)))
    if len(text) <= room:
        return text
    tail = room * 2 // 3
    return text[: room - tail - 1] + "…" + text[-tail:]


def number(value: float) -> str:
    """Return *value* as short as SVG takes it."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def layer_class(depth: int) -> str:
    """Return the name of the colour of the layer at *depth*."""
    return f"layer{depth}" if depth < len(palette.LAYERS) else "deeper"


def kind_class(kind: Kind) -> str:
    """Return the name of the colour of *kind*."""
    return {"zero": "zero", "unallocated": "none"}.get(kind.what) or layer_class(kind.depth)


class Picture:
    """An SVG document that grows. Its ids are made from its content, so that many pictures can stand in one page."""

    def __init__(self, width: float, theme: Theme = "auto") -> None:
        self.width = width
        self._theme = theme
        self._parts: list[str] = []
        self._hatched: dict[str, str] = {}
        self._windows = 0

    # -- elements

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str | None = None,
        radius: float = 0,
        title: str = "",
        dashed: bool = False,
    ) -> None:
        """Draw a rectangle in the colour named *fill*, with an optional border and a hover text."""
        attributes = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        if radius:
            attributes += f' rx="{number(radius)}"'
        attributes += self._paint(fill, stroke)
        if dashed:
            attributes += ' stroke-dasharray="4 3"'
        self._parts.append(
            f"<rect {attributes}><title>{clean(title)}</title></rect>" if title else f"<rect {attributes}/>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        fill: str = "ink",
        bold: bool = False,
        mono: bool = False,
        anchor: Literal["start", "middle", "end"] = "start",
    ) -> None:
        """Write *text* with its base line at *y*."""
        extra = ' font-weight="600"' if bold else ""
        extra += f' font-family="{clean(MONO)}"' if mono else ""
        extra += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self._parts.append(
            f'<text x="{number(x)}" y="{number(y)}" font-size="{number(size)}"{extra}{self._paint(fill)}>{clean(text)}</text>'
        )

    def path(self, data: str, *, stroke: str, width: float = 1.5, dashed: bool = False, fill: str = "") -> None:
        """Draw a line along *data* (SVG path syntax)."""
        extra = ' stroke-dasharray="4 4"' if dashed else ""
        paint = self._paint(fill or "empty", stroke)
        self._parts.append(f'<path d="{data}" stroke-width="{number(width)}" stroke-linecap="round"{paint}{extra}/>')

    def space(self, x: float, y: float, width: float, height: float, kind: Kind, *, title: str = "") -> None:
        """Draw a piece of a disk of *kind*; compressed data is hatched."""
        self.rect(x, y, width, height, kind_class(kind), title=title)
        if kind.what == "compressed":
            attributes = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
            self._parts.append(f'<rect {attributes} fill="url(#{self._hatch()})" pointer-events="none"/>')

    @contextmanager
    def window(self, x: float, y: float, width: float, height: float, radius: float) -> Iterator[None]:
        """Show what is drawn inside the ``with`` block through a window with round corners only."""
        self._windows += 1
        identity = f"{_OWN}w{self._windows}"
        self._parts.append(
            f'<clipPath id="{identity}"><rect x="{number(x)}" y="{number(y)}" width="{number(width)}" '
            f'height="{number(height)}" rx="{number(radius)}"/></clipPath><g clip-path="url(#{identity})">'
        )
        yield
        self._parts.append("</g>")

    # -- the whole

    def render(self, height: float, title: str, description: str) -> str:
        """Return the document, *height* pixels high; *title* and *description* are for readers who do not see it."""
        width, tall = number(self.width), number(height)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{tall}" viewBox="0 0 {width} {tall}" '
            f'role="img" font-family="{clean(SANS)}" class="cowhand-picture">\n'
            f"<title>{clean(title)}</title>\n<desc>{clean(description)}</desc>\n"
        )
        defs = "".join(self._hatched.values())
        ground = f'<rect width="{width}" height="{tall}" rx="12"{self._paint("ground")}/>\n'
        body = "\n".join(self._parts)
        text = f"{head}{self._style()}{f'<defs>{defs}</defs>' if defs else ''}\n{ground}{body}\n</svg>\n"
        return text.replace(_OWN, f"p{zlib.crc32(text.encode()):08x}-")

    # -- colours

    def _colour(self, name: str) -> str:
        shade: Shade = _SHADES[name]
        return shade.dark if self._theme == "dark" else shade.light

    def _paint(self, fill: str, stroke: str | None = None) -> str:
        if fill == "empty":
            return f' fill="none" stroke="{self._colour(stroke)}" class="s-{stroke}"' if stroke else ' fill="none"'
        out = f' fill="{self._colour(fill)}"'
        classes = f"f-{fill}"
        if stroke:
            out += f' stroke="{self._colour(stroke)}"'
            classes += f" s-{stroke}"
        return f'{out} class="{classes}"'

    def _style(self) -> str:
        if self._theme != "auto":
            return ""
        rules = "".join(
            f".cowhand-picture .f-{name}{{fill:{shade.dark}}}.cowhand-picture .s-{name}{{stroke:{shade.dark}}}"
            for name, shade in _SHADES.items()
        )
        return f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"

    def _hatch(self) -> str:
        identity = f"{_OWN}hatch"
        if identity not in self._hatched:
            self._hatched[identity] = (
                f'<pattern id="{identity}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
                f'<rect width="2.2" height="6" fill="{self._colour("ground")}" fill-opacity="0.55" class="f-ground"/></pattern>'
            )
        return identity

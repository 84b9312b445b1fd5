"""The colours of kinds of space, in pictures and on terminals, for light and for dark surroundings."""

from __future__ import annotations

from typing import NamedTuple


class Shade(NamedTuple):
    """One colour: on a light and on a dark ground (``#rrggbb``), and on a terminal of 256 colours."""

    light: str
    dark: str
    terminal: str


#: One for each layer of a chain, the active one first; neighbours differ for colour-blind eyes too.
LAYERS = (
    Shade("#2563eb", "#60a5fa", "dodger_blue1"),
    Shade("#d97706", "#fbbf24", "orange1"),
    Shade("#0d9488", "#2dd4bf", "dark_cyan"),
    Shade("#9333ea", "#c084fc", "medium_purple1"),
    Shade("#db2777", "#f472b6", "hot_pink"),
    Shade("#65a30d", "#a3e635", "chartreuse3"),
    Shade("#0e7490", "#22d3ee", "deep_sky_blue2"),
)
#: All layers below those.
DEEPER = Shade("#7c6f64", "#b8a99a", "tan")

ZERO = Shade("#b6c2d2", "#53637a", "grey58")
UNALLOCATED = Shade("#eef2f7", "#1b2638", "grey35")

GROUND = Shade("#ffffff", "#0f172a", "default")
CARD = Shade("#f8fafc", "#152033", "default")
EDGE = Shade("#d5dde8", "#33415a", "grey50")
INK = Shade("#0f172a", "#e6edf7", "default")
QUIET = Shade("#5b6b82", "#93a4bd", "grey62")
ALARM = Shade("#b91c1c", "#f87171", "red")


def layer(depth: int) -> Shade:
    """Return the colour of the layer at *depth* (0: the active one)."""
    return LAYERS[depth] if depth < len(LAYERS) else DEEPER

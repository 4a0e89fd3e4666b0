"""The look that all figures share, and figures as bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1f2328", "#636c76", "#d8dce1", "#ffffff"
BASELINE, ALIGNED = "#E69F00", "#0072B2"
"""Colours of the two models in all figures: orange before alignment, blue after."""
ERROR = "#c1002a"
CATEGORICAL = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9",
    "#D55E00", "#F0E442", "#7F5AA8", "#8C6D46", "#4D4D4D",
)  # fmt: skip
"""The palette of Okabe and Ito, which is safe for colour-blind readers, and three more colours."""
NAMED_COLOURS = {
    "red": "#D55E00",
    "green": "#009E73",
    "blue": "#0072B2",
    "yellow": "#F0E442",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "cyan": "#56B4E9",
    "white": "#FFFFFF",
}
"""Fills of classes named after colours: the nearest of the palette, as some readers confuse plain red and green."""
MODELS = {"baseline": BASELINE, "aligned": ALIGNED}

_RC: dict[Any, Any] = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    # Without a fixed salt, element ids are random and equal runs give different bytes.
    "svg.hashsalt": "localign",
}

P = ParamSpec("P")
T = TypeVar("T")


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to run under the report's matplotlib settings; the caller's settings are restored."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(_RC):
            return function(*args, **kwargs)

    return inside


def new_figure(width: float, height: float) -> Figure:
    """An empty figure without a window, outside pyplot's list of figures.

    Args:
        width: Inches.
        height: Inches.
    """
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.05)
    return figure


@styled
def png(figure: Figure, dpi: int = 160) -> bytes:
    """A figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


@styled
def svg(figure: Figure) -> bytes:
    """A figure as SVG; text becomes outlines, so that it looks the same everywhere."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a ``data:`` URI; ``kind`` is a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

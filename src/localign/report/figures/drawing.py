"""A figure with its caption and data, and what all figures share: short names, legends, bare axes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerErrorbar
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from localign.files import replace_text, replacing
from localign.report.captions import Words
from localign.report.style import INK, MUTED, PAPER, png, svg
from localign.text.printing import csv_cell, plain_mathtext, printable

WIDTH = 10.6
"""Width of a figure that fills the page, inches."""
NAME_LENGTH = 30
"""Characters of a name; longer names are shortened in the middle."""
WHISKER: dict[str, Any] = {"ecolor": INK, "elinewidth": 1.0, "capsize": 2.0, "capthick": 1.0, "fmt": "none"}
SEED_DOT: dict[str, Any] = {
    "linestyle": "none", "marker": "o", "markersize": 2.8, "markerfacecolor": PAPER,
    "markeredgecolor": INK, "markeredgewidth": 0.7,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One figure of the report."""

    name: str
    """Name of its files, without suffix."""
    figure: Figure
    words: Words
    header: tuple[str, ...]
    """Columns of ``rows``."""
    rows: tuple[tuple[Any, ...], ...]
    """The data that is drawn; recalls as fractions."""
    vector: bool = True
    """Whether to write SVG; figures with photographs are pixels only."""

    def save(self, folder: Path) -> list[Path]:
        """Write ``<name>.png``, ``.svg`` (if :attr:`vector`) and ``.csv`` with the data; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.png"]
        write_bytes(paths[0], png(self.figure))
        if self.vector:
            paths.append(folder / f"{self.name}.svg")
            write_bytes(paths[-1], svg(self.figure))
        if self.rows:
            paths.append(folder / f"{self.name}.csv")
            replace_text(paths[-1], to_csv(self.header, self.rows))
        return paths


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def to_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated text; None becomes an empty cell, numbers keep all their digits, text is no formula."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([csv_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return stream.getvalue()


# -- names -----------------------------------------------------------------------------------------------


def short_names(names: Sequence[str], limit: int = NAME_LENGTH) -> list[str]:
    """Names of at most ``limit`` characters that stay different.

    Long names lose their middle. If that makes two equal, all long names lose their beginning instead, or their end;
    if nothing helps, names are numbered.
    """
    tidy = [printable(" ".join(name.split())) for name in names]
    for head, tail in ((limit // 2, limit - limit // 2 - 1), (0, limit - 1), (limit - 1, 0)):
        short = [_cut(name, head, tail) for name in tidy]
        if len(set(short)) == len(short):
            break
    else:
        short = _numbered(tidy, limit)
    return [plain_mathtext(name) for name in short]


def _cut(name: str, head: int, tail: int) -> str:
    return name if len(name) <= head + tail + 1 else f"{name[:head]}…{name[len(name) - tail :]}"


def _numbered(names: Sequence[str], limit: int) -> list[str]:
    numbered: list[str] = []
    for i, name in enumerate(names, start=1):
        number = f" ({i})"
        numbered.append(_cut(name, limit - len(number) - 1, 0) + number)
    return numbered


def slug(name: str) -> str:
    """A name that is safe in a file name: letters, digits, dots and single hyphens."""
    letters = "".join(c if c.isascii() and (c.isalnum() or c == ".") else "-" for c in name)
    return "-".join(part for part in letters.split("-") if part.strip("."))[-80:] or "backbone"


# -- legends ---------------------------------------------------------------------------------------------


def whisker_handle() -> Any:
    """The legend entry of intervals."""
    figure = Figure()
    label = "95 % bootstrap interval over images"
    return figure.subplots().errorbar([0], [0], xerr=[1], label=label, **WHISKER)


def seeds_handle() -> Line2D:
    """The legend entry of single seeds."""
    return Line2D([], [], label="single seeds", **SEED_DOT)


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """Put a legend at the bottom of the figure."""
    if handles:
        figure.legend(
            handles=list(handles),
            loc="outside lower center",
            ncols=_legend_columns(handles, figure.get_figwidth()),
            columnspacing=1.6,
            handler_map={ErrorbarContainer: HandlerErrorbar(xerr_size=0.8)},
        )


def legend_height(handles: Sequence[Any], width: float = WIDTH) -> float:
    """Height that :func:`legend_below` takes, inches."""
    if not handles:
        return 0.0
    return 0.12 + 0.19 * math.ceil(len(handles) / _legend_columns(handles, width))


def _legend_columns(handles: Sequence[Any], width: float) -> int:
    """The largest number of columns that fits, each as wide as its longest entry; entries run down the columns."""
    labels = [len(str(h.get_label())) for h in handles]
    for count in range(len(labels), 1, -1):
        columns = np.array_split(np.asarray(labels), count)
        if sum(0.07 * column.max() + 0.55 for column in columns) <= width:
            return count
    return 1


# -- text and axes ----------------------------------------------------------------------------------------


def headline(figure: Figure, title: str) -> None:
    """Give the figure its title."""
    figure.suptitle(plain_mathtext(title), x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def points(difference: float) -> str:
    """A difference of two shares in points, with its sign: ``+1.7``."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\u2212")


def show(ax: Axes, picture: NDArray[Any]) -> None:
    """Draw an image without axes, its pixels as they are."""
    ax.imshow(picture, interpolation="nearest")
    bare(ax)


def bare(ax: Axes, frame: bool = False) -> None:
    """Remove grid, ticks and, by default, the frame."""
    ax.grid(visible=False)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(frame)


def below(ax: Axes, text: str) -> None:
    """Write small text under a picture."""
    ax.set_xlabel(text, fontsize=8, color=MUTED, labelpad=3)

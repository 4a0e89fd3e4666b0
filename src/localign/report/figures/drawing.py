"""A figure with its words and its data, and what all figures share: short names, legends, text that fits."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerErrorbar
from matplotlib.lines import Line2D

from localign.files import replace_text, replacing
from localign.report.captions import Words
from localign.report.style import INK, PAPER, png, svg

WIDTH = 10.6
"""Of a figure as wide as the page, inches."""
NAME_LENGTH = 30
"""Longer names are shortened in the middle, letters."""
WHISKER: dict[str, Any] = {"ecolor": INK, "elinewidth": 1.0, "capsize": 2.0, "capthick": 1.0, "fmt": "none"}
SEED_DOT: dict[str, Any] = {
    "linestyle": "none", "marker": "o", "markersize": 2.8, "markerfacecolor": PAPER,
    "markeredgecolor": INK, "markeredgewidth": 0.7,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One figure of the report."""

    name: str
    """Of its files."""
    figure: Figure
    words: Words
    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    """What is drawn; recalls as fractions."""
    vector: bool = True
    """Whether it is lines and letters; photographs are left as pixels."""

    def save(self, folder: Path) -> list[Path]:
        """Write ``<name>.png``, ``.svg`` where it is a drawing of lines, and ``.csv`` with its data."""
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
    """Write a file that is whole or absent."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def to_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated text; None is an empty cell, numbers keep all their digits."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


# -- names -----------------------------------------------------------------------------------------------


def short_names(names: Sequence[str], limit: int = NAME_LENGTH) -> list[str]:
    """Names of at most ``limit`` letters that stay different.

    Long ones lose their middle; where that makes two alike, all long ones lose their beginning, or else their
    end; where nothing helps, the alike are numbered.
    """
    tidy = [" ".join(name.split()) for name in names]
    for head, tail in ((limit // 2, limit - limit // 2 - 1), (0, limit - 1), (limit - 1, 0)):
        shown = [_cut(name, head, tail) for name in tidy]
        if len(set(shown)) == len(shown):
            break
    else:
        shown = _numbered(tidy, limit)
    # A dollar sign would begin mathematics.
    return [name.replace("$", r"\$") for name in shown]


def _cut(name: str, head: int, tail: int) -> str:
    return name if len(name) <= head + tail + 1 else f"{name[:head]}…{name[len(name) - tail :]}"


def _numbered(names: Sequence[str], limit: int) -> list[str]:
    shown: list[str] = []
    for i, name in enumerate(names, start=1):
        number = f" ({i})"
        shown.append(_cut(name, limit - len(number) - 1, 0) + number)
    return shown


def slug(name: str) -> str:
    """A name as part of a file name: letters, digits, dots and single hyphens."""
    letters = "".join(c if c.isascii() and (c.isalnum() or c == ".") else "-" for c in name)
    return "-".join(part for part in letters.split("-") if part.strip("."))[-80:] or "backbone"


# -- legends ---------------------------------------------------------------------------------------------


def whisker_handle() -> Any:
    """What stands for an interval in a legend."""
    figure = Figure()
    return figure.subplots().errorbar([0], [0], xerr=[1], label=interval_label(), **WHISKER)


def interval_label() -> str:
    """What whiskers are."""
    return "95 % bootstrap interval over images"


def seeds_handle() -> Line2D:
    """What stands for single seeds in a legend."""
    return Line2D([], [], label="single seeds", **SEED_DOT)


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """The figure's legend, under everything."""
    if handles:
        figure.legend(
            handles=list(handles),
            loc="outside lower center",
            ncols=_legend_columns(handles, figure.get_figwidth()),
            columnspacing=1.6,
            handler_map={ErrorbarContainer: HandlerErrorbar(xerr_size=0.8)},
        )


def legend_height(handles: Sequence[Any], width: float = WIDTH) -> float:
    """What :func:`legend_below` will take of a figure's height, inches."""
    if not handles:
        return 0.0
    return 0.12 + 0.19 * math.ceil(len(handles) / _legend_columns(handles, width))


def _legend_columns(handles: Sequence[Any], width: float) -> int:
    """As many columns as fit, each as wide as its longest entry; entries run down the columns."""
    labels = [len(str(h.get_label())) for h in handles]
    for count in range(len(labels), 1, -1):
        columns = np.array_split(np.asarray(labels), count)
        if sum(0.07 * column.max() + 0.55 for column in columns) <= width:
            return count
    return 1


# -- text ------------------------------------------------------------------------------------------------


def headline(figure: Figure, title: str) -> None:
    """The title of the whole figure."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def points(difference: float) -> str:
    """A difference of shares in points, signed: ``+1.7``."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\u2212")

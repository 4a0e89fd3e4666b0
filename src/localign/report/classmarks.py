"""How classes look in a patch: a fill, a sign, or both.

The words of a class name decide: a colour's word gives its fill, a shape's word its sign, so that a patch that
holds "red" and "circle" is a red cell with a disc. Class 0 is pale grey. Other classes get fills of the
categorical palette in the order of how often they occur, and grey once the palette is used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.path import Path
from numpy.typing import NDArray

from localign.report.style import CATEGORICAL, NAMED_COLOURS

GROUND_FILL = "#e3e5e8"
OTHER_FILL = "#a9afb6"
_UNIT = 0.5
SIGNS: dict[str, str | Path] = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "cross": "P",
    "ring": "$\\circ$",
    "hourglass": Path(
        [(-_UNIT, _UNIT), (_UNIT, _UNIT), (-_UNIT, -_UNIT), (_UNIT, -_UNIT), (-_UNIT, _UNIT)],
        [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY],
    ),
    "bar": Path(
        [(-_UNIT, 0.2), (_UNIT, 0.2), (_UNIT, -0.2), (-_UNIT, -0.2), (-_UNIT, 0.2)],
        [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY],
    ),
}


@dataclass(frozen=True)
class ClassMark:
    """The look of one class."""

    name: str
    fill: str | None
    sign: str | Path | None
    in_legend: bool = True
    """False for classes that share the grey of "other classes"."""


def class_marks(names: Sequence[str], frequency: NDArray[np.floating]) -> list[ClassMark]:
    """The look of every class.

    Args:
        names: C class names; the first is "ground" or "unlabeled".
        frequency: ``(C,)``, how much of the pictures each class takes; classes at 0 stay out of the legend.
    """
    palette = iter(CATEGORICAL)
    given: dict[int, str] = {}
    for i in np.argsort(-frequency, kind="stable"):
        fill, sign = _by_words(names[i])
        if i and fill is None and sign is None and frequency[i] > 0:
            given[int(i)] = next(palette, OTHER_FILL)
    marks = []
    for i, name in enumerate(names):
        fill, sign = _by_words(name)
        if i == 0:
            fill, sign = GROUND_FILL, None
        elif fill is None and sign is None:
            fill = given.get(i, OTHER_FILL)
        marks.append(ClassMark(name, fill, sign, in_legend=frequency[i] > 0 and fill != OTHER_FILL))
    return marks


def _by_words(name: str) -> tuple[str | None, str | Path | None]:
    words = name.lower().replace("-", " ").replace("_", " ").split()
    fill = next((NAMED_COLOURS[w] for w in words if w in NAMED_COLOURS), None)
    sign = next((SIGNS[w] for w in words if w in SIGNS), None)
    known = sum(w in NAMED_COLOURS or w in SIGNS for w in words)
    # "orange" in "orange juice" is no colour.
    return (fill, sign) if known == len(words) else (None, None)

"""How classes look in a patch: a fill, a sign, or both.

Where every class but the first is made of words for colours and shapes, these decide: a colour's word gives
the fill, a shape's word the sign, so that a patch that holds "red" and "circle" is a red cell with a disc.
Otherwise classes get fills of the categorical palette, the most frequent first, and grey once it is used up.
Class 0 is pale grey.
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
    marks = [ClassMark(names[0], GROUND_FILL, None, bool(frequency[0] > 0))]
    words = [_by_words(name) for name in names[1:]]
    if all(found is not None for found in words):
        looks = [found for found in words if found is not None]
    else:
        palette = dict(zip(np.argsort(-frequency[1:], kind="stable").tolist(), CATEGORICAL, strict=False))
        looks = [(palette.get(i, OTHER_FILL), None) for i in range(len(names) - 1)]
    for name, (fill, sign), often in zip(names[1:], looks, frequency[1:], strict=True):
        marks.append(ClassMark(name, fill, sign, in_legend=bool(often > 0) and fill != OTHER_FILL))
    return marks


def made_of_words(names: Sequence[str]) -> bool:
    """Whether every class but the first says by its name how it looks."""
    return len(names) > 1 and all(_by_words(name) is not None for name in names[1:])


def _by_words(name: str) -> tuple[str | None, str | Path | None] | None:
    """Fill and sign of a name made of nothing but words for colours and shapes; else None."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    if not words or not all(w in NAMED_COLOURS or w in SIGNS for w in words):
        return None
    fill = next((NAMED_COLOURS[w] for w in words if w in NAMED_COLOURS), None)
    return fill, next((SIGNS[w] for w in words if w in SIGNS), None)

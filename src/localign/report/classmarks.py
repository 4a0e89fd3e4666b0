"""How classes are drawn in a patch: a fill, a sign, or both.

If the names of all classes but the first consist of words for colours and shapes, these words decide: a colour is the
fill and a shape is the sign, so a patch with "red" and "circle" is a red cell with a disc. Otherwise classes get the
fills of the categorical palette, the most frequent class first, and grey once the palette is used up. Class 0 is pale
grey.
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
        frequency: ``(C,)``, number of patches of each class in the pictures; classes at 0 stay out of the legend.
    """
    marks = [ClassMark(names[0], GROUND_FILL, None, bool(frequency[0] > 0))]
    if looks_from_names(names):
        looks = [look for look in map(_look_from_name, names[1:]) if look is not None]
    else:
        palette = dict(zip(np.argsort(-frequency[1:], kind="stable").tolist(), CATEGORICAL, strict=False))
        looks = [(palette.get(i, OTHER_FILL), None) for i in range(len(names) - 1)]
    for name, (fill, sign), patches in zip(names[1:], looks, frequency[1:], strict=True):
        marks.append(ClassMark(name, fill, sign, in_legend=bool(patches > 0) and fill != OTHER_FILL))
    return marks


def looks_from_names(names: Sequence[str]) -> bool:
    """Whether the names of all classes but the first consist of words for colours and shapes."""
    return len(names) > 1 and all(_look_from_name(name) is not None for name in names[1:])


def _look_from_name(name: str) -> tuple[str | None, str | Path | None] | None:
    """Fill and sign of a name that consists of words for colours and shapes; None for other names."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    if not words or not all(w in NAMED_COLOURS or w in SIGNS for w in words):
        return None
    fill = next((NAMED_COLOURS[w] for w in words if w in NAMED_COLOURS), None)
    return fill, next((SIGNS[w] for w in words if w in SIGNS), None)

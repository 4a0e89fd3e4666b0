"""OCID-Ref, validation: the box that a sentence describes, at three degrees of clutter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from localign.errors import UserError
from localign.text.reading import parse_json, read_json
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.boxes import Size
from localign.vlm.scoring.messages import box_of
from localign.vlm.scoring.questions import Question
from localign.vlm.scoring.readers import field, four_numbers
from localign.vlm.scoring.referring import Referring, checked_box

SIZE = Size(640, 480)
"""Size of every image, pixels."""

CLUTTER = {"Minimum": range(10), "Medium": range(10, 17), "Maximum": range(17, 21)}
"""The numbers of the takes with each degree of clutter; objects are added from take to take."""


class OCIDRef(Referring):
    """``download/ocid-ref``: ``val_expressions.json`` and ``OCID-dataset``."""

    name = "ocid-ref"
    splits = tuple(CLUTTER)
    threshold = 0.25
    expected: ClassVar[Counts] = {TOTAL: (18342,)}
    headline = ("accuracy__OCIDRef-All",)

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {f"OCIDRef-{split}": (split,) for split in self.splits} | {"OCIDRef-All": self.splits}

    def files(self, root: Path) -> tuple[Path, ...]:
        return (root / "download" / "ocid-ref" / "val_expressions.json",)

    def questions(self, root: Path) -> Iterator[Question]:
        (path,) = self.files(root)
        expressions = read_json(path)
        if not isinstance(expressions, dict):
            raise UserError(f"{path} is not an object from ids to expressions")
        for name, expression in expressions.items():
            where = f"{path}, expression {name}"
            box = checked_box(_box(field(expression, "bbox", str, where), where), SIZE, where)
            yield Question(
                id=name,
                image=str(path.parent / "OCID-dataset" / field(expression, "scene_path", str, where)),
                message=box_of(field(expression, "sentence", str, where)),
                split=_clutter(field(expression, "take_id", int, where), where),
                payload={"box": box, "size": tuple(SIZE)},
            )


def _box(text: str, where: str) -> tuple[float, float, float, float]:
    try:
        value = parse_json(text, where)
    except UserError:
        raise UserError(f"{where}: the field 'bbox' is {text!r:.60}, not a list in JSON") from None
    return four_numbers(value, "bbox", where)


def _clutter(take: int, where: str) -> str:
    for split, takes in CLUTTER.items():
        if take in takes:
            return split
    raise UserError(f"{where}: the take must be 0 to 20, not {take}")

"""RefCOCO, RefCOCO+ and RefCOCOg, validation: the box that a sentence describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from localign.errors import UserError
from localign.text.reading import read_json
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.boxes import Corners, Size
from localign.vlm.scoring.messages import box_of
from localign.vlm.scoring.questions import Question
from localign.vlm.scoring.readers import StoredImage, as_list, field, four_numbers, read_pickle, stored_image
from localign.vlm.scoring.referring import Referring, checked_box

SETS = {
    "RefCOCO": ("refcoco", "refs(unc).p"),
    "RefCOCO+": ("refcoco+", "refs(unc).p"),
    "RefCOCOg": ("refcocog", "refs(umd).p"),
}
"""By published name: the folder, and the file that defines the splits."""


class RefCOCO(Referring):
    """``download/refcoco``: a folder for each set, and ``train2014``."""

    name = "refcoco"
    splits = tuple(SETS)
    threshold = 0.5
    expected: ClassVar[Counts] = {
        "RefCOCO": (10834,),
        "RefCOCO+": (10758,),
        "RefCOCOg": (4896,),
        TOTAL: (26488,),
    }
    headline = tuple(f"accuracy__{split}" for split in SETS)

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {split: (split,) for split in SETS}

    def files(self, root: Path) -> tuple[Path, ...]:
        folder = root / "download" / "refcoco"
        return tuple(
            folder / name / part for name, file in SETS.values() for part in ("instances.json", file)
        )

    def questions(self, root: Path) -> Iterator[Question]:
        folder = root / "download" / "refcoco"
        files = self.files(root)
        for split, boxes_file, refs in zip(SETS, files[::2], files[1::2], strict=True):
            boxes = _boxes(boxes_file)
            for number, ref in enumerate(as_list(read_pickle(refs), refs)):
                where = f"{refs}, reference {number}"
                if field(ref, "split", str, where) == "val":
                    yield from _questions(ref, split, boxes, folder / "train2014", where)

    def complete(self, questions: list[Question]) -> list[Question]:
        stored = {image: stored_image(image) for image in {question.image for question in questions}}
        return [_with_size(question, stored[question.image]) for question in questions]


def _with_size(question: Question, stored: StoredImage) -> Question:
    """The question with its image's size, and its box in the image as models see it."""
    box = checked_box(question.payload["box"], Size(*stored[:2]), f"question {question.id}")
    return dataclasses.replace(question, payload={"box": stored.upright(box), "size": stored.upright_size})


def _boxes(path: Path) -> dict[int, Corners]:
    """By annotation id: left, top, right and bottom in pixels."""
    found = {}
    for number, annotation in enumerate(field(read_json(path), "annotations", list, path)):
        where = f"{path}, annotation {number}"
        x, y, width, height = four_numbers(field(annotation, "bbox", list, where), "bbox", where)
        name = field(annotation, "id", int, where)
        if name in found:
            raise UserError(f"{where}: the id {name} occurs more than once")
        found[name] = (x, y, x + width, y + height)
    return found


def _questions(
    ref: Any, split: str, boxes: dict[int, Corners], images: Path, where: str
) -> Iterator[Question]:
    """One question for each sentence of a reference."""
    annotation = field(ref, "ann_id", int, where)
    if annotation not in boxes:
        raise UserError(f"{where}: instances.json does not hold the annotation {annotation}")
    image = str(images / f"COCO_train2014_{field(ref, 'image_id', int, where):012d}.jpg")
    for sentence in field(ref, "sentences", list, where):
        yield Question(
            id=f"{split}-{field(ref, 'ref_id', int, where)}-{field(sentence, 'sent_id', int, where)}",
            image=image,
            message=box_of(field(sentence, "sent", str, where)),
            split=split,
            payload={"box": boxes[annotation]},
        )

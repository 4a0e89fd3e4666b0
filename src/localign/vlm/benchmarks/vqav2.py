"""VQAv2, validation: open questions with ten annotators' answers each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from localign.errors import UserError
from localign.vlm.scoring.base import TOTAL, Answer, Counts, Question, Sample
from localign.vlm.scoring.messages import short_answer
from localign.vlm.scoring.metrics import Ratio, Statistic, rows_by
from localign.vlm.scoring.normalisation import VQAV2
from localign.vlm.scoring.open_ended import OpenEnded, scores_of
from localign.vlm.scoring.readers import field, read_json, records, strings

TYPES = ("answer_type", "question_type")


class VQAv2(OpenEnded):
    """``download/vqa-v2``: ``v2_val2014_questions.json``, ``v2_val2014_annotations.json``, ``images_val2014``.

    Published rounded to two decimals, in percent.
    """

    name = "vqav2"
    splits = ("val2014",)
    expected: ClassVar[Counts] = {TOTAL: (214354,)}
    expected_images = 40504
    headline = ("accuracy",)
    evaluator = VQAV2

    def questions(self, root: Path) -> Iterator[Question]:
        folder = root / "download" / "vqa-v2"
        path = folder / "v2_val2014_annotations.json"
        asked = _texts(folder / "v2_val2014_questions.json")
        images = _Images(folder / "images_val2014")
        for annotation in _annotations(path):
            text = asked.get(annotation.question)
            if text is None:
                raise UserError(f"{path}: there is no question {annotation.question} in {folder}")
            yield Question(
                id=str(annotation.question),
                image=images[annotation.image],
                message=short_answer(text),
                split="val2014",
                payload={
                    "answers": annotation.answers,
                    "answer_type": annotation.answer_type,
                    "question_type": annotation.question_type,
                },
            )

    def score_answer(self, question: Question, answer: Answer) -> Sample:
        return super().score_answer(question, answer) | {name: question.payload[name] for name in TYPES}

    def statistics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        """``accuracy``, and by type, as in ``accuracy-by-answer-type[yes/no]``."""
        scores = scores_of(samples)
        found: dict[str, Statistic] = {"accuracy": Ratio(scores)}
        for name in TYPES:
            figure = f"accuracy-by-{name.replace('_', '-')}"
            for value, rows in sorted(rows_by(sample[name] for sample in samples).items()):
                found[f"{figure}[{value}]"] = Ratio(scores[rows], rows=rows)
        return found


class _Images(dict[int, str]):
    """Paths by image id; one string for all questions on an image."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, image: int) -> str:
        return self.setdefault(image, str(self._folder / f"COCO_val2014_{image:012d}.jpg"))


class _Annotation(NamedTuple):
    question: int
    image: int
    answer_type: str
    question_type: str
    answers: tuple[str, ...]


def _texts(path: Path) -> dict[int, str]:
    def compact(record: dict[str, Any]) -> Any:
        if "question_id" not in record:
            return record
        return field(record, "question_id", int, path), field(record, "question", str, path)

    return dict(records(field(read_json(path, compact), "questions", list, path), path))


def _annotations(path: Path) -> list[_Annotation]:
    """Two million answers, each an object in the file: kept are their strings, each different one once."""

    def compact(record: dict[str, Any]) -> Any:
        if "answer" in record:
            return record["answer"]
        if "answers" not in record:
            return record
        where = f"{path}, question {record.get('question_id')}"
        return _Annotation(
            field(record, "question_id", int, where),
            field(record, "image_id", int, where),
            sys.intern(field(record, "answer_type", str, where)),
            sys.intern(field(record, "question_type", str, where)),
            tuple(map(sys.intern, strings(field(record, "answers", list, where), "answers", where))),
        )

    found = field(read_json(path, compact), "annotations", list, path)
    for number, annotation in enumerate(found):
        if not isinstance(annotation, _Annotation):
            raise UserError(f"{path}, annotation {number}: the field 'answers' is missing")
    return found

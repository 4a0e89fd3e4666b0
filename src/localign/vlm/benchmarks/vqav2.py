"""VQAv2, validation: open questions with ten annotators' answers each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from localign.errors import UserError
from localign.statistics.resampling import Statistic
from localign.text.reading import read_json
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.messages import short_answer
from localign.vlm.scoring.metrics import Ratio, rows_by
from localign.vlm.scoring.normalisation import VQAV2
from localign.vlm.scoring.open_ended import OpenEnded, scores_of
from localign.vlm.scoring.questions import Answer, AnswerScore, Question, Sample
from localign.vlm.scoring.readers import field, strings


class VQAv2(OpenEnded):
    """``download/vqa-v2``: ``v2_val2014_questions.json``, ``v2_val2014_annotations.json``, ``images_val2014``.

    Published in percent, rounded to two decimals.
    """

    name = "vqav2"
    splits = ("val2014",)
    expected: ClassVar[Counts] = {TOTAL: (214354,)}
    expected_images = 40504
    headline = ("accuracy",)
    evaluator = VQAV2

    def files(self, root: Path) -> tuple[Path, ...]:
        folder = root / "download" / "vqa-v2"
        return folder / "v2_val2014_annotations.json", folder / "v2_val2014_questions.json"

    def questions(self, root: Path) -> Iterator[Question]:
        path, text_path = self.files(root)
        texts = _texts(text_path)
        images = _ImagePaths(path.parent / "images_val2014")
        for annotation in _annotations(path):
            text = texts.get(annotation.question)
            if text is None:
                raise UserError(
                    f"{path} annotates the question {annotation.question}, which v2_val2014_questions.json lacks"
                )
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

    def score_answer(self, question: Question, answer: Answer) -> AnswerScore:
        return {
            **super().score_answer(question, answer),
            "answer_type": question.payload["answer_type"],
            "question_type": question.payload["question_type"],
        }

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        """``accuracy``, and accuracies by type such as ``accuracy-by-answer-type[yes/no]``."""
        scores = scores_of(samples)
        found: dict[str, Statistic] = {"accuracy": Ratio(scores)}
        types = {
            "answer-type": rows_by(sample["answer_type"] for sample in samples),
            "question-type": rows_by(sample["question_type"] for sample in samples),
        }
        for kind, rows_of in types.items():
            for value, rows in sorted(rows_of.items()):
                found[f"accuracy-by-{kind}[{value}]"] = Ratio(scores[rows], rows=rows)
        return found


class _ImagePaths(dict[int, str]):
    """Paths by image id. All questions on an image share one string."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, image: int) -> str:
        return self.setdefault(image, str(self._folder / f"COCO_val2014_{image:012d}.jpg"))


class _Text(NamedTuple):
    question: int
    text: str


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
        return _Text(field(record, "question_id", int, path), field(record, "question", str, path))

    found = field(read_json(path, compact=compact), "questions", list, path)
    for number, text in enumerate(found):
        if not isinstance(text, _Text):
            raise UserError(f"{path}, question {number}: the field 'question_id' is missing")
    texts: dict[int, str] = dict(found)
    if len(texts) < len(found):
        raise UserError(f"{path} holds {len(found)} questions, but only {len(texts)} question ids")
    return texts


def _annotations(path: Path) -> list[_Annotation]:
    """The annotations. Of the file's two million answer objects, only the strings stay in memory, each once."""

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

    found = field(read_json(path, compact=compact), "annotations", list, path)
    for number, annotation in enumerate(found):
        if not isinstance(annotation, _Annotation):
            raise UserError(f"{path}, annotation {number}: the field 'answers' is missing")
    return found

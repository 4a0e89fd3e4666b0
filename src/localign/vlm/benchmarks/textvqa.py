"""TextVQA, validation: questions about text in pictures, with and without the output of an OCR system."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from localign.errors import UserError
from localign.statistics.resampling import Statistic
from localign.text.reading import read_json
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.messages import SHORT, short_answer
from localign.vlm.scoring.metrics import Ratio
from localign.vlm.scoring.normalisation import TEXTVQA
from localign.vlm.scoring.open_ended import OpenEnded, scores_of
from localign.vlm.scoring.questions import Question, Sample
from localign.vlm.scoring.readers import as_list, field, records_of, strings

ANNOTATORS = 10
OCR_MARK = "\nReference OCR token:"
"""Stands between the question and the OCR tokens."""


class TextVQA(OpenEnded):
    """Without OCR tokens. ``download/text-vqa``: ``TextVQA_0.5.1_val.json``, ``textvqa_val_v051_ocr.jsonl``,
    ``train_val_images``. Published as shares of one.

    The files of annotations and of OCR tokens are joined by position. They are refused if most of their questions
    differ.
    """

    name = "textvqa"
    splits = ("val",)
    expected: ClassVar[Counts] = {TOTAL: (5000,)}
    expected_images = 3166
    headline = ("accuracy__TextVQA-Pure",)
    evaluator = TEXTVQA
    metric_name: ClassVar[str] = "accuracy__TextVQA-Pure"

    def files(self, root: Path) -> tuple[Path, ...]:
        folder = root / "download" / "text-vqa"
        return folder / "TextVQA_0.5.1_val.json", folder / "textvqa_val_v051_ocr.jsonl"

    def questions(self, root: Path) -> Iterator[Question]:
        path, text_path = self.files(root)
        data = as_list(field(read_json(path), "data", list, path), path)
        texts = _texts(text_path, data, path)
        for number, (record, text) in enumerate(zip(data, texts, strict=True)):
            where = f"{path}, record {number}"
            answers = strings(field(record, "answers", list, where), "answers", where)
            if len(answers) != ANNOTATORS:
                raise UserError(f"{where}: there are {len(answers)} answers, not {ANNOTATORS}")
            yield Question(
                id=str(field(record, "question_id", int, where)),
                image=str(path.parent / "train_val_images" / f"{field(record, 'image_id', str, where)}.jpg"),
                message=short_answer(self.question_text(text)),
                split="val",
                payload={"answers": answers},
            )

    def question_text(self, text: str) -> str:
        """The part of a question with OCR tokens that the model sees."""
        return text.split(OCR_MARK)[0]

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        return {self.metric_name: Ratio(scores_of(samples))}


class TextVQAWithOCR(TextVQA):
    """TextVQA with OCR tokens in the question."""

    name = "textvqa-ocr"
    headline = ("accuracy__TextVQA-OCR",)
    metric_name = "accuracy__TextVQA-OCR"

    def question_text(self, text: str) -> str:
        return text


def _texts(path: Path, data: list[object], annotations: Path) -> list[str]:
    """The questions with OCR tokens, without the instruction that ends them in some editions of the file."""
    found = []
    different = 0
    lines = records_of(path)
    if len(lines) != len(data):
        raise UserError(f"{path} holds {len(lines)} questions, but {annotations.name} holds {len(data)}")
    for number, (line, record) in enumerate(zip(lines, data, strict=True)):
        text = field(line, "text", str, f"{path}, record {number}").removesuffix(SHORT).rstrip("\n")
        question = field(record, "question", str, f"{annotations}, record {number}")
        different += text.split(OCR_MARK)[0].strip().casefold() != question.strip().casefold()
        found.append(text)
    if 2 * different > len(found):
        raise UserError(
            f"{path} is not in the order of {annotations.name}: {different} of {len(found)} questions are different"
        )
    return found

"""TextVQA, validation: questions on text in pictures, with and without the words an OCR system found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from localign.errors import UserError
from localign.vlm.scoring.base import TOTAL, Counts, Question, Sample
from localign.vlm.scoring.messages import SHORT, short_answer
from localign.vlm.scoring.metrics import Ratio, Statistic
from localign.vlm.scoring.normalisation import TEXTVQA
from localign.vlm.scoring.open_ended import OpenEnded, scores_of
from localign.vlm.scoring.readers import field, read_json, read_json_lines, records, strings

ANNOTATORS = 10
OCR_MARK = "\nReference OCR token:"
"""Begins the words of the OCR system, after the question."""


class TextVQA(OpenEnded):
    """Without OCR. ``download/text-vqa``: ``TextVQA_0.5.1_val.json``, ``textvqa_val_v051_ocr.jsonl``,
    ``train_val_images``. Published as shares of one.

    The file with OCR goes with the annotations by position, so it is refused where most of its questions are others.
    """

    name = "textvqa"
    splits = ("val",)
    expected: ClassVar[Counts] = {TOTAL: (5000,)}
    expected_images = 3166
    headline = ("accuracy__TextVQA-Pure",)
    evaluator = TEXTVQA
    figure: ClassVar[str] = "accuracy__TextVQA-Pure"

    def questions(self, root: Path) -> Iterator[Question]:
        folder = root / "download" / "text-vqa"
        path = folder / "TextVQA_0.5.1_val.json"
        data = records(field(read_json(path), "data", list, path), path)
        texts = _texts(folder / "textvqa_val_v051_ocr.jsonl", data, path)
        for number, (record, text) in enumerate(zip(data, texts, strict=True)):
            where = f"{path}, record {number}"
            answers = strings(field(record, "answers", list, where), "answers", where)
            if len(answers) != ANNOTATORS:
                raise UserError(f"{where}: there are {len(answers)} answers, not {ANNOTATORS}")
            yield Question(
                id=str(field(record, "question_id", int, where)),
                image=str(folder / "train_val_images" / f"{field(record, 'image_id', str, where)}.jpg"),
                message=short_answer(self.asked(text)),
                split="val",
                payload={"answers": answers},
            )

    def asked(self, text: str) -> str:
        """Of a question with OCR, what is asked."""
        return text.split(OCR_MARK)[0]

    def statistics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        return {self.figure: Ratio(scores_of(samples))}


class TextVQAWithOCR(TextVQA):
    """With OCR; otherwise the same."""

    name = "textvqa-ocr"
    headline = ("accuracy__TextVQA-OCR",)
    figure = "accuracy__TextVQA-OCR"

    def asked(self, text: str) -> str:
        return text


def _texts(path: Path, data: list[object], annotations: Path) -> list[str]:
    """Questions with OCR; an instruction at their end, which some editions of the file have, is taken off."""
    found = []
    strangers = 0
    lines = read_json_lines(path)
    if len(lines) != len(data):
        raise UserError(f"{path} holds {len(lines)} questions, but {annotations.name} holds {len(data)}")
    for number, (line, record) in enumerate(zip(lines, data, strict=True)):
        text = field(line, "text", str, f"{path}, record {number}").removesuffix(SHORT).rstrip("\n")
        question = field(record, "question", str, f"{annotations}, record {number}")
        strangers += text.split(OCR_MARK)[0].strip().casefold() != question.strip().casefold()
        found.append(text)
    if 2 * strangers > len(found):
        raise UserError(
            f"{path} is not in the order of {annotations.name}: {strangers} of {len(found)} questions are different"
        )
    return found

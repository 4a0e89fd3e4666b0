"""AI2D: multiple-choice questions on diagrams, in the splits "test" and "val" (all other images)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from localign.errors import UserError
from localign.statistics.resampling import Statistic
from localign.text.reading import read_json, read_text
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.messages import LETTERS, letter_of_choice
from localign.vlm.scoring.multiple_choice import MultipleChoice, multiple_choice_metrics
from localign.vlm.scoring.questions import Question, Sample
from localign.vlm.scoring.readers import field, strings

CHOICES = 4
"""Number of letters that are compared, also for questions with fewer choices; as published."""


class AI2D(MultipleChoice):
    """``download/ai2d``: ``val_qa/questions``, ``val_qa/images`` and ``ai2d_test_ids.csv``.

    "val" includes the data set's training images. Files are read in the order of their numbers. The published order
    is that of a file system and cannot be reproduced, so subsets differ from published subsets.
    """

    name = "ai2d"
    splits = ("val", "test")
    expected: ClassVar[Counts] = {TOTAL: (15501,)}
    headline = ("accuracy__AI2D-test-Accuracy", "accuracy__AI2D-final-Accuracy")

    def files(self, root: Path) -> tuple[Path, ...]:
        folder = root / "download" / "ai2d"
        questions = _question_files(folder / "val_qa" / "questions")
        return folder / "ai2d_test_ids.csv", *(path for _, path in questions)

    def questions(self, root: Path) -> Iterator[Question]:
        folder = root / "download" / "ai2d"
        test = _test_images(folder / "ai2d_test_ids.csv")
        for number, path in _question_files(folder / "val_qa" / "questions"):
            content = read_json(path)
            image = str(folder / "val_qa" / "images" / field(content, "imageName", str, path))
            for position, (text, record) in enumerate(field(content, "questions", dict, path).items()):
                where = f"{path}, question {position}"
                texts = strings(field(record, "answerTexts", list, where), "answerTexts", where)
                label = field(record, "correctAnswer", int, where)
                if not 0 <= label < min(CHOICES, len(texts)):
                    raise UserError(
                        f"{where}: the right answer has the index {label}, but only the first "
                        f"{min(CHOICES, len(texts))} answers can be chosen"
                    )
                yield Question(
                    id=f"{number}-{position}",
                    image=image,
                    message=letter_of_choice(text, texts),
                    split="test" if number in test else "val",
                    payload={"label": label},
                    choices=tuple(LETTERS[:CHOICES]),
                )

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        return multiple_choice_metrics(samples, "AI2D", self.splits)


def _test_images(path: Path) -> set[int]:
    """The image numbers in the first column."""
    lines = (line.split(",")[0].strip() for line in read_text(path).splitlines())
    try:
        return {int(value) for value in lines if value}
    except ValueError as error:
        raise UserError(f"{path}: the first column must hold image numbers: {error}") from None


def _question_files(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = []
    for path in folder.glob("*.json"):
        number = path.name.split(".")[0]
        if not number.isdecimal():
            raise UserError(f"{path} is not named by the number of its image")
        found.append((int(number), path))
    return sorted(found)

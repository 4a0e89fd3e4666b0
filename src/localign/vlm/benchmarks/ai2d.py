"""AI2D: multiple-choice questions on diagrams, those of the test images and all others ("val")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from localign.errors import UserError
from localign.vlm.scoring.base import TOTAL, Counts, Question, Sample
from localign.vlm.scoring.messages import LETTERS, letter_of_choice
from localign.vlm.scoring.metrics import Statistic
from localign.vlm.scoring.multiple_choice import MultipleChoice, multiple_choice_figures
from localign.vlm.scoring.readers import field, read_json, read_text, strings

CHOICES = 4
"""Letters that are compared, whatever the number of choices: as published."""


class AI2D(MultipleChoice):
    """``download/ai2d``: ``val_qa/questions``, ``val_qa/images`` and ``ai2d_test_ids.csv``.

    The images that are not in the test set include the data set's training images. Files are read in the order of
    their numbers; the published order, and with it every subset, followed the file system.
    """

    name = "ai2d"
    splits = ("val", "test")
    expected: ClassVar[Counts] = {TOTAL: (15501,)}
    headline = ("accuracy__AI2D-test-Accuracy", "accuracy__AI2D-final-Accuracy")

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
                    raise UserError(f"{where}: there is no answer {label} among the first {CHOICES}")
                yield Question(
                    id=f"{number}-{position}",
                    image=image,
                    message=letter_of_choice(text, texts),
                    split="test" if number in test else "val",
                    payload={"label": label},
                    choices=tuple(LETTERS[:CHOICES]),
                )

    def statistics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        return multiple_choice_figures(samples, "AI2D", self.splits)


def _test_images(path: Path) -> set[int]:
    """The numbers in the first column."""
    lines = (line.split(",")[0].strip() for line in read_text(path).splitlines())
    try:
        return {int(value) for value in lines if value}
    except ValueError as error:
        raise UserError(f"the first column of {path} holds image numbers: {error}") from None


def _question_files(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = []
    for path in folder.glob("*.json"):
        number = path.name.split(".")[0]
        if not number.isdecimal():
            raise UserError(f"{path} is not named after the number of its image")
        found.append((int(number), path))
    return sorted(found)

"""TallyQA, test: simple and complex counting questions, with the numbers 0 to 15 as choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from localign.errors import UserError
from localign.statistics.resampling import Statistic
from localign.text.reading import read_json
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.messages import LETTERS, letter_of_choice
from localign.vlm.scoring.multiple_choice import MultipleChoice, multiple_choice_metrics
from localign.vlm.scoring.questions import Question, Sample
from localign.vlm.scoring.readers import as_list, field, zero_or_one

COUNTS = tuple(str(count) for count in range(16))


class TallyQA(MultipleChoice):
    """``download/tally-qa``: ``test.json``, ``VG_100K`` and ``VG_100K_2``."""

    name = "tallyqa"
    splits = ("simple", "complex")
    expected: ClassVar[Counts] = {"simple": (22991,), "complex": (15598,), TOTAL: (38589,)}
    headline = ("accuracy__TallyQA-simple-Accuracy", "accuracy__TallyQA-complex-Accuracy")

    def files(self, root: Path) -> tuple[Path, ...]:
        return (root / "download" / "tally-qa" / "test.json",)

    def questions(self, root: Path) -> Iterator[Question]:
        (path,) = self.files(root)
        for number, record in enumerate(as_list(read_json(path), path)):
            where = f"{path}, record {number}"
            answer = field(record, "answer", int, where)
            if not 0 <= answer < len(COUNTS):
                raise UserError(f"{where}: the answer must be 0 to {len(COUNTS) - 1}, not {answer}")
            yield Question(
                id=str(field(record, "question_id", int, where)),
                image=str(path.parent / field(record, "image", str, where)),
                message=letter_of_choice(field(record, "question", str, where), COUNTS),
                split="simple" if zero_or_one(record, "issimple", where) else "complex",
                payload={"label": answer},
                choices=tuple(LETTERS[: len(COUNTS)]),
            )

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        return multiple_choice_metrics(samples, "TallyQA", self.splits)

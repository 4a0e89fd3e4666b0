"""VSR, zero-shot test: whether a statement on the relation of two things is true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from localign.statistics.resampling import Statistic
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.messages import true_or_false
from localign.vlm.scoring.metrics import Ratio
from localign.vlm.scoring.multiple_choice import MultipleChoice, binary_curves, columns
from localign.vlm.scoring.questions import Question, Sample
from localign.vlm.scoring.readers import field, records_of, zero_or_one

CHOICES = ("True", "False")


class VSR(MultipleChoice):
    """``download/vsr``: ``test.jsonl`` and ``images``. "True" is the positive class."""

    name = "vsr"
    splits = ("test",)
    expected: ClassVar[Counts] = {TOTAL: (1222,)}
    expected_images = 715
    headline = ("accuracy__VSR-ExactMatch",)

    def files(self, root: Path) -> tuple[Path, ...]:
        return (root / "download" / "vsr" / "test.jsonl",)

    def questions(self, root: Path) -> Iterator[Question]:
        (path,) = self.files(root)
        for number, record in enumerate(records_of(path)):
            where = f"{path}, record {number}"
            yield Question(
                id=str(number),
                image=str(path.parent / "images" / field(record, "image", str, where)),
                message=true_or_false(field(record, "caption", str, where)),
                split="test",
                payload={
                    "label": 1 - zero_or_one(record, "label", where),
                    "relation": field(record, "relation", str, where),
                },
                choices=CHOICES,
            )

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        scores, probabilities, labels = columns(samples)
        rows = np.arange(len(scores))
        curves = binary_curves("accuracy__VSR", probabilities[:, 0], labels == 0, rows)
        return {"accuracy__VSR-ExactMatch": Ratio(scores)} | curves

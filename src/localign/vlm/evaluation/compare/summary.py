"""What a comparison needs of one model's answers to one benchmark; the answers themselves may then be forgotten.

The answers of one model to all benchmarks take a gigabyte, and a comparison may be of twenty models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from localign.vlm.evaluation.compare.differences import Figures
from localign.vlm.evaluation.results import ScoredAnswers, facts_of
from localign.vlm.scoring.intervals import bootstrap


@dataclass(frozen=True)
class RunSummary:
    """One training run's answers to one benchmark."""

    facts: Mapping[str, Any]
    """As :func:`~localign.vlm.evaluation.results.facts_of` gives them."""
    figures: Figures
    scores: Mapping[str, float]
    """By question, in 0..1."""


def summarise_run(judged: ScoredAnswers) -> RunSummary:
    """All figures, on the images and on resampled ones, and the score of every question."""
    suite, records = judged.benchmark, judged.records
    figures = Figures(suite.aggregate(records), bootstrap(suite, records))
    return RunSummary(
        facts_of(judged, figures.values), figures, {record["id"]: record["score"] for record in records}
    )


@dataclass(frozen=True)
class ModelSummary:
    """One model's answers to one benchmark."""

    runs: Sequence[RunSummary]
    """One for each training seed."""
    figures: Figures
    """Means over seeds; a figure that some seed lacks is None."""

    def known(self, figure: str) -> list[float]:
        """The figure of every seed; empty if some seed lacks it."""
        values = [run.figures.values.get(figure) for run in self.runs]
        return [value for value in values if value is not None] if None not in values else []

    def mean_scores(self) -> dict[str, float]:
        """Of every question, over seeds."""
        return {
            name: sum(run.scores[name] for run in self.runs) / len(self.runs) for name in self.runs[0].scores
        }


def mean_over_seeds(runs: Sequence[RunSummary]) -> ModelSummary:
    """The means over training seeds that were asked the same questions."""
    values: dict[str, float | None] = {}
    for figure in runs[0].figures.values:
        found = [run.figures.values.get(figure) for run in runs]
        known = [value for value in found if value is not None]
        values[figure] = sum(known) / len(known) if len(known) == len(found) else None
    draws = {
        figure: torch.stack([run.figures.draws[figure] for run in runs]).mean(dim=0)
        for figure in runs[0].figures.draws
    }
    return ModelSummary(runs, Figures(values, draws))

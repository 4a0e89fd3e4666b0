"""Summaries of scored answers, with everything that a comparison needs.

The answers of one model take about a gigabyte, and a comparison may have twenty models. Summaries replace them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from localign.statistics.resampling import ResampledMetrics, mean_metrics
from localign.vlm.evaluation.results import AnswerRecord, OutcomeFacts, ScoredAnswers, facts_of
from localign.vlm.scoring.intervals import resampled_metrics


@dataclass(frozen=True)
class RunSummary:
    """The answers of one training run to one benchmark."""

    facts: OutcomeFacts
    metrics: ResampledMetrics
    """Percent."""
    scores: Mapping[str, float]
    """By question id, 0..1."""
    asked: str
    """Digest of the questions and their right answers, independent of their order and of the images' folder."""


def summarise_run(scored: ScoredAnswers) -> RunSummary:
    """Compute all metrics, on the images as they are and on resampled images."""
    metrics = resampled_metrics(scored.benchmark, scored.records)
    scores = {record["id"]: record["score"] for record in scored.records}
    return RunSummary(facts_of(scored, metrics.values), metrics, scores, _asked(scored.records))


def _asked(records: Sequence[AnswerRecord]) -> str:
    digest = blake2b(digest_size=16)
    for record in sorted(records, key=lambda record: record["id"]):
        image = os.path.basename(record["image"])
        digest.update(json.dumps([record["id"], image, record["message"], record["truth"]]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelSummary:
    """The answers of one model to one benchmark, over its training seeds."""

    runs: Sequence[RunSummary]
    """One per seed."""
    metrics: ResampledMetrics
    """Means over seeds; None for a metric that some seed does not define."""

    def seed_values(self, metric: str) -> list[float]:
        """The metric of every seed; empty if some seed does not define it."""
        values = [run.metrics.values.get(metric) for run in self.runs]
        return [value for value in values if value is not None] if None not in values else []

    def mean_scores(self) -> dict[str, float]:
        """By question id, the mean score over seeds, 0..1."""
        return {
            name: sum(run.scores[name] for run in self.runs) / len(self.runs) for name in self.runs[0].scores
        }


def summarise_seeds(runs: Sequence[RunSummary]) -> ModelSummary:
    """Combine training seeds that answered the same questions."""
    return ModelSummary(runs, mean_metrics([run.metrics for run in runs]))

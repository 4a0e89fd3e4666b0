"""Bootstrap intervals over images, and paired differences between two models."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_files import likely, scored, words, write_pope, write_vqav2
from test_bench_scores import VQA

from localign.errors import UserError
from localign.statistics.bootstrap import replicate_weights
from localign.statistics.mcnemar import check_same_questions
from localign.statistics.resampling import ResampledDifference, paired_differences
from localign.vlm.benchmarks.table import benchmark
from localign.vlm.scoring.intervals import bootstrap, intervals, resampled_metrics
from localign.vlm.scoring.questions import Sample


def samples(scores: Iterable[float], per_image: int = 1) -> list[Sample]:
    """Samples of VQAv2, whose first metric is the mean score."""
    return [
        {
            "id": str(number),
            "image": f"{number // per_image}.jpg",
            "split": "val2014",
            "score": float(score),
            "parsed": "",
            "truth": "",
            "answer_type": "other",
            "question_type": "what is",
        }
        for number, score in enumerate(scores)
    ]


SUITE = benchmark("vqav2")


def differences(first: Sequence[Sample], second: Sequence[Sample]) -> dict[str, ResampledDifference]:
    check_same_questions(*([sample["id"] for sample in side] for side in (first, second)))
    return paired_differences(*(resampled_metrics(SUITE, side) for side in (first, second)))


def accuracy_interval(found: Sequence[Sample]) -> tuple[float, float]:
    low, high = intervals(SUITE, found)["accuracy"] or [math.nan, math.nan]
    return low, high


def test_the_interval_of_a_proportion() -> None:
    scores = np.random.default_rng(0).binomial(1, 0.7, 2000)
    half = 196 * math.sqrt(scores.mean() * (1 - scores.mean()) / 2000)
    middle = 100 * scores.mean()
    assert accuracy_interval(samples(scores)) == pytest.approx((middle - half, middle + half), abs=0.3)


def test_questions_on_one_image_are_drawn_together() -> None:
    """Ten equal answers per image give the same interval as one answer per image."""
    scores = np.random.default_rng(0).binomial(1, 0.7, 200)
    assert accuracy_interval(samples(np.repeat(scores, 10), per_image=10)) == pytest.approx(
        accuracy_interval(samples(scores))
    )


def test_the_order_of_samples_and_the_size_of_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = samples(np.random.default_rng(0).random(60), per_image=2)
    shuffled = random.Random(0).sample(found, len(found))
    expected = bootstrap(SUITE, found)["accuracy"]
    torch.testing.assert_close(bootstrap(SUITE, shuffled)["accuracy"], expected)
    monkeypatch.setattr("localign.statistics.bootstrap.CHUNK_BYTES", 8 * 60 * 7)
    torch.testing.assert_close(bootstrap(SUITE, found)["accuracy"], expected)


def test_every_metric_of_a_benchmark_has_an_interval(tmp_path: Path) -> None:
    suite = benchmark("pope")
    data = suite.read(write_pope(tmp_path), allow_partial=True)
    found = scored(suite, data, likely({q.id: (0.9, 0.1) for q in data.questions}))
    assert set(intervals(suite, found, 20)) == set(suite.aggregate(found))


def test_metrics_that_are_never_defined_have_no_interval(tmp_path: Path) -> None:
    suite = benchmark("pope")
    data = suite.read(write_pope(tmp_path, ("no", "no")), allow_partial=True)
    found = scored(suite, data, likely({q.id: (0.9, 0.1) for q in data.questions}))
    assert intervals(suite, found, 20)["accuracy__POPE-random-AUCROC"] is None


def test_differences_are_paired() -> None:
    """Two models that differ on few questions: their difference has a much narrower interval than each model."""
    first = np.random.default_rng(0).binomial(1, 0.5, 1000)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:20]] = 1
    found = differences(samples(first), samples(second))["accuracy"]
    low, high = found.interval or [math.nan, math.nan]
    assert found.value == pytest.approx(2.0)
    assert 0.9 < low < 2 < high < 3.1
    assert np.subtract(*accuracy_interval(samples(first))[::-1]) > 6


def test_models_that_answered_different_questions_are_not_compared(tmp_path: Path) -> None:
    data = SUITE.read(write_vqav2(tmp_path), allow_partial=True)
    found = scored(SUITE, data, words(VQA))
    with pytest.raises(UserError, match="different questions: 1 went to one model only, for example"):
        differences(found, found[1:])
    with pytest.raises(UserError, match="different questions"):
        differences(found, [*found[1:], found[1]])


@pytest.mark.slow
def test_the_interval_of_a_difference_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 pairs of models with a true difference of 4 points, on 150 images with 1 to 4 correlated questions each."""
    cached_weights = functools.cache(replicate_weights)
    monkeypatch.setattr("localign.statistics.bootstrap.replicate_weights", cached_weights)
    draw = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        sizes = draw.integers(1, 5, 150)
        ease = np.repeat(draw.uniform(-0.3, 0.3, 150), sizes)
        first = draw.random(len(ease)) < 0.5 + ease
        second = draw.random(len(ease)) < 0.54 + ease
        pair = [samples(scores) for scores in (first, second)]
        for found in pair:
            for sample, image in zip(found, np.repeat(np.arange(150), sizes), strict=True):
                sample["image"] = f"{image}.jpg"
        low, high = differences(*pair)["accuracy"].interval or [math.nan, math.nan]
        covered += low <= 4 <= high
    assert 930 <= covered <= 970

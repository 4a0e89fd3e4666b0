"""Intervals, paired differences, McNemar's test and z-scores."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_files import likely, scored, words, write_pope, write_vqav2
from test_bench_scores import VQA

from localign.errors import UserError
from localign.statistics.mcnemar import check_same, mcnemar
from localign.statistics.paired import difference_over_seeds, interval_over_seeds
from localign.statistics.z_scores import z_scores
from localign.vlm.benchmarks.table import benchmark
from localign.vlm.evaluation.compare.differences import Difference, Figures, differences
from localign.vlm.scoring import intervals as module
from localign.vlm.scoring.base import Sample
from localign.vlm.scoring.intervals import bootstrap, intervals


def samples(scores: Sequence[float], per_image: int = 1) -> list[Sample]:
    """Of VQAv2, whose first figure is the mean score."""
    return [
        {
            "id": str(number),
            "image": f"{number // per_image}.jpg",
            "split": "val2014",
            "score": float(score),
            "answer_type": "other",
            "question_type": "what is",
        }
        for number, score in enumerate(scores)
    ]


SUITE = benchmark("vqav2")


def scores_of(found: Sequence[Sample]) -> dict[str, float]:
    return {sample["id"]: sample["score"] for sample in found}


def paired_differences(first: Sequence[Sample], second: Sequence[Sample]) -> dict[str, Difference]:
    check_same(*([sample["id"] for sample in side] for side in (first, second)))
    return differences(*(Figures(SUITE.aggregate(side), bootstrap(SUITE, side)) for side in (first, second)))


def accuracy_interval(found: Sequence[Sample]) -> tuple[float, float]:
    low, high = intervals(SUITE, found)["accuracy"] or [math.nan, math.nan]
    return low, high


def test_the_interval_of_a_proportion() -> None:
    scores = np.random.default_rng(0).binomial(1, 0.7, 2000)
    half = 196 * math.sqrt(scores.mean() * (1 - scores.mean()) / 2000)
    middle = 100 * scores.mean()
    assert accuracy_interval(samples(scores)) == pytest.approx((middle - half, middle + half), abs=0.3)


def test_questions_on_one_image_are_drawn_together() -> None:
    """Ten equal answers on each image say no more than one: the interval is that of the images."""
    scores = np.random.default_rng(0).binomial(1, 0.7, 200)
    assert accuracy_interval(samples(np.repeat(scores, 10), per_image=10)) == pytest.approx(
        accuracy_interval(samples(scores))
    )


def test_the_order_of_samples_and_the_size_of_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = samples(np.random.default_rng(0).random(60), per_image=2)
    shuffled = random.Random(0).sample(found, len(found))
    whole = bootstrap(SUITE, found)["accuracy"]
    torch.testing.assert_close(bootstrap(SUITE, shuffled)["accuracy"], whole)
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * 60 * 7)
    torch.testing.assert_close(bootstrap(SUITE, found)["accuracy"], whole)


def test_every_figure_of_a_benchmark_has_an_interval(tmp_path: Path) -> None:
    suite = benchmark("pope")
    data = suite.read(write_pope(tmp_path), allow_partial=True)
    found = scored(suite, data, likely({q.id: (0.9, 0.1) for q in data.questions}))
    assert set(intervals(suite, found, 20)) == set(suite.aggregate(found))


def test_figures_that_are_never_defined_have_no_interval(tmp_path: Path) -> None:
    suite = benchmark("pope")
    data = suite.read(write_pope(tmp_path, ("no", "no")), allow_partial=True)
    found = scored(suite, data, likely({q.id: (0.9, 0.1) for q in data.questions}))
    assert intervals(suite, found, 20)["accuracy__POPE-random-AUCROC"] is None


def test_differences_are_paired() -> None:
    """Both models are right on the same questions but for a few: their difference is far surer than either."""
    first = np.random.default_rng(0).binomial(1, 0.5, 1000)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:20]] = 1
    found = paired_differences(samples(first), samples(second))["accuracy"]
    low, high = found.interval or [math.nan, math.nan]
    assert found.value == pytest.approx(2.0)
    assert 0.9 < low < 2 < high < 3.1
    assert np.subtract(*accuracy_interval(samples(first))[::-1]) > 6


def test_models_that_answered_different_questions_are_not_compared(tmp_path: Path) -> None:
    data = SUITE.read(write_vqav2(tmp_path), allow_partial=True)
    found = scored(SUITE, data, words(VQA))
    with pytest.raises(UserError, match="different questions: 1 were put to one of them alone, for example"):
        paired_differences(found, found[1:])
    with pytest.raises(UserError, match="different questions"):
        paired_differences(found, [*found[1:], found[1]])
    with pytest.raises(UserError, match="different questions"):
        mcnemar(scores_of(found), scores_of(found[1:]))


@pytest.mark.slow
def test_the_interval_of_a_difference_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 pairs of models whose true difference is 4 points, on 150 images of 1 to 4 questions that hang together."""
    monkeypatch.setattr(module, "replicate_weights", functools.cache(module.replicate_weights))
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
        low, high = paired_differences(*pair)["accuracy"].interval or [math.nan, math.nan]
        covered += low <= 4 <= high
    assert 930 <= covered <= 970


@pytest.mark.parametrize(
    ("fewer", "more", "p_value"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 9, 2 * (1 + 10) / 1024),
        (3, 7, 2 * (1 + 10 + 45 + 120) / 1024),
        (5, 5, 1.0),
    ],
)
def test_mcnemar_by_hand(fewer: int, more: int, p_value: float) -> None:
    first = [1.0] * fewer + [0.0] * more + [1.0, 0.0] * 4
    second = [0.0] * fewer + [1.0] * more + [1.0, 0.0] * 4
    found = mcnemar(scores_of(samples(first)), scores_of(samples(second)[::-1]))
    assert found[:2] == (fewer, more)
    assert found.p_value == pytest.approx(p_value)


def test_mcnemar_of_many_questions_is_that_of_the_normal_distribution() -> None:
    fewer, more = 4_900, 5_100
    first, second = (dict(enumerate([float(i)] * fewer + [float(1 - i)] * more)) for i in (1, 0))
    found = mcnemar(*({str(name): score for name, score in side.items()} for side in (first, second)))
    z = (more - fewer - 1) / math.sqrt(fewer + more)
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_intervals_over_seeds() -> None:
    # mean 70, deviation 2; t of 2 degrees of freedom is 4.3027
    assert interval_over_seeds([68, 70, 72]) == pytest.approx(
        [70 - 4.3027 * 2 / 3**0.5, 70 + 4.3027 * 2 / 3**0.5]
    )
    assert interval_over_seeds([70]) is None
    wide = interval_over_seeds([0, 1] * 15) or [math.nan, math.nan]  # 29 degrees of freedom: 2.045
    assert (wide[1] - wide[0]) / 2 == pytest.approx(2.0452 * np.std([0, 1] * 15, ddof=1) / 30**0.5, rel=1e-3)


def test_differences_over_seeds_are_paired_where_there_are_as_many() -> None:
    # differences 1, 2, 3: mean 2, deviation 1
    half = 4.3027 / 3**0.5
    assert difference_over_seeds([60, 70, 80], [61, 72, 83]) == pytest.approx([2 - half, 2 + half])
    # Welch: variances 4/2 and 1/3 of the means, (7/3)^2 / (4 + 1/18) = 1.34 degrees of freedom, rounded down
    half = 12.7062 * (4 / 2 + 1 / 3) ** 0.5
    apart = difference_over_seeds([60 - 2**0.5, 60 + 2**0.5], [71, 72, 73])
    assert apart == pytest.approx([12 - half, 12 + half])
    assert difference_over_seeds([60], [61, 62]) is None
    assert difference_over_seeds([60, 60], [61, 61, 61]) == [1, 1]


def test_z_scores_by_hand() -> None:
    found = z_scores(
        {
            "a": {"x": 60.0, "y": 10.0, "alone": 5.0, "same": 1.0},
            "b": {"x": 70.0, "y": None, "same": 1.0},
            "c": {"x": 80.0, "y": 30.0},
            "d": {},
        }
    )
    deviation = math.sqrt(200 / 3)
    assert found.means == pytest.approx({"x": 70, "y": 20, "alone": 5, "same": 1})
    assert found.deviations == pytest.approx({"x": deviation, "y": 10, "alone": 1, "same": 0})
    assert found.scores["a"] == pytest.approx({"x": -10 / deviation, "y": -1, "alone": 0, "same": 0})
    assert found.scores["b"] == pytest.approx({"x": 0, "same": 0})
    assert found.averages == pytest.approx(
        {"a": (-10 / deviation - 1) / 4, "b": 0, "c": (10 / deviation + 1) / 2, "d": None}
    )

"""Is the gain real? Intervals, paired differences and tests for figures of benchmarks.

Questions on one image are not independent, so what is resampled is images. The draws are keyed by replicate and
number of images alone: two models judged on the same questions are compared on the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from localign.errors import UserError
from localign.probing.bootstrap import CHUNK_BYTES, REPLICATES, interval, replicate_weights
from localign.report.tables import paired
from localign.seeds import half_width, half_width_apart
from localign.vlm.benchmarks.base import Benchmark, Sample
from localign.vlm.benchmarks.metrics import Draws


def bootstrap(
    benchmark: Benchmark, samples: Sequence[Sample], replicates: int = REPLICATES
) -> dict[str, Tensor]:
    """Every figure on images drawn with replacement, in percent.

    Returns:
        By figure float64 ``(replicates,)``; NaN where a replicate does not define the figure. The order of the
        samples makes no difference.
    """
    samples = sorted(samples, key=lambda sample: str(sample["id"]))
    statistics = benchmark.statistics(samples)
    places: dict[str, int] = {}
    unit = torch.tensor([places.setdefault(sample["image"], len(places)) for sample in samples])
    step = max(1, CHUNK_BYTES // (8 * max(1, len(samples))))
    parts: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for begin in range(0, replicates, step):
        draws = Draws(replicate_weights(len(places), begin, min(begin + step, replicates)), unit)
        for name, statistic in statistics.items():
            parts[name].append(100 * statistic.replicates(draws))
    return {name: torch.cat(values) for name, values in parts.items()}


def intervals(
    benchmark: Benchmark, samples: Sequence[Sample], replicates: int = REPLICATES
) -> dict[str, list[float] | None]:
    """The 95 % percentile interval of every figure, ``[low, high]`` in percent; None where there is none."""
    return {name: interval(values) for name, values in bootstrap(benchmark, samples, replicates).items()}


class Difference(NamedTuple):
    """The second model's figure minus the first's, in points of percent."""

    value: float | None
    interval: list[float] | None
    """Of 95 %; the gain is beyond chance on these questions where 0 lies outside."""


def paired_differences(
    benchmark: Benchmark, first: Sequence[Sample], second: Sequence[Sample], replicates: int = REPLICATES
) -> dict[str, Difference]:
    """How far two models' figures are apart, from paired resampling of the images.

    Raises:
        UserError: The models did not answer the same questions.
    """
    check_paired(first, second)
    sides = [Figures(benchmark.aggregate(s), bootstrap(benchmark, s, replicates)) for s in (first, second)]
    return differences(*sides)


class Figures(NamedTuple):
    """A benchmark's figures, in percent, and what they are on resampled images."""

    values: Mapping[str, float | None]
    draws: Mapping[str, Tensor]
    """As :func:`bootstrap` gives them; of several training seeds the mean, which has the images' spread alone."""


def differences(first: Figures, second: Figures) -> dict[str, Difference]:
    """How far two models' figures on the same questions are apart."""
    found = {}
    for name, draws in first.draws.items():
        before, after = first.values.get(name), second.values.get(name)
        value = None if before is None or after is None else after - before
        found[name] = Difference(value, interval(second.draws[name] - draws))
    return found


def check_paired(first: Sequence[Sample], second: Sequence[Sample]) -> None:
    """Refuse to compare answers to different questions. Raises UserError."""
    check_same(*([sample["id"] for sample in samples] for samples in (first, second)))


def check_same(first: Collection[str], second: Collection[str]) -> None:
    """Refuse to compare answers to different questions, told by their ids. Raises UserError."""
    if len(first) != len(second) or set(first) != set(second):
        alone = sorted(set(first) ^ set(second))
        example = f", for example {alone[0]}" if alone else ""
        raise UserError(
            f"the models answered different questions: {len(alone)} were put to one of them alone{example}"
        )


_ROUNDING = 1e-9


class McNemar(NamedTuple):
    """Questions on which two models differ."""

    first_better: int
    second_better: int
    p_value: float
    """Of as uneven a division, or more, if either model were as likely to be the better one; two-sided, exact."""


def mcnemar(first: Mapping[str, float], second: Mapping[str, float]) -> McNemar:
    """McNemar's exact test on the scores of two models; of soft scores, the sign test, which it then is.

    Other than :func:`paired_differences` it takes questions for independent, also where they share an image. Of models
    trained with several seeds, give every question's mean score.

    Args:
        first: Scores by question.
        second: The other model's.

    Raises:
        UserError: The models did not answer the same questions.
    """
    check_same(first, second)
    gains = [second[name] - score for name, score in first.items()]
    # Means over seeds may differ in their last bit where they are the same.
    fewer, more = sum(gain < -_ROUNDING for gain in gains), sum(gain > _ROUNDING for gain in gains)
    return McNemar(fewer, more, _sign_test(fewer, more))


def _sign_test(first: int, second: int) -> float:
    """Twice the probability of at most the smaller number of heads in as many throws of a fair coin."""
    throws, heads = first + second, torch.arange(min(first, second) + 1, dtype=torch.float64)
    total = torch.tensor(float(throws), dtype=torch.float64)
    log_ways = torch.lgamma(total + 1) - torch.lgamma(heads + 1) - torch.lgamma(total - heads + 1)
    return min(1.0, 2 * math.exp(float(torch.logsumexp(log_ways, 0)) - throws * math.log(2)))


def interval_over_seeds(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the mean over training runs that differ in their seed, by Student's t.

    It says what other seeds would give on the same questions; :func:`intervals` says what other images would give to
    the same models. None for a single run.
    """
    half = half_width(values)
    return None if half is None else _around(float(np.mean(values)), half)


def difference_over_seeds(first: Sequence[float], second: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the second model's mean over seeds minus the first's.

    As many runs on either side are taken for pairs, by their position (Student); otherwise none are (Welch). None
    where a side has a single run: nothing tells how far another run of it would lie.
    """
    if min(len(first), len(second)) < 2:
        return None
    found = paired(first, second)
    half = found.half_width if len(first) == len(second) else half_width_apart(first, second)
    return None if half is None else _around(float(np.mean(second) - np.mean(first)), half)


def _around(middle: float, half: float) -> list[float]:
    return [middle - half, middle + half]


@dataclass(frozen=True)
class ZScores:
    """Figures of a pool of models on common scales; all belong to this pool only."""

    means: dict[str, float]
    """Of each figure, over the models that have it."""
    deviations: dict[str, float]
    """Population standard deviation (divided by n); 1 where one model alone has the figure."""
    scores: dict[str, dict[str, float]]
    """By model and figure: the distance from the mean in standard deviations."""
    averages: dict[str, float | None]
    """By model: the plain mean over its figures; None where it has none."""


def z_scores(figures: Mapping[str, Mapping[str, float | None]]) -> ZScores:
    """Put the figures of several models on common scales.

    Where all models agree, every z-score is 0.

    Args:
        figures: By model and figure; what is None or left out counts nowhere.
    """
    columns: dict[str, list[float]] = {}
    for row in figures.values():
        for name, value in row.items():
            if value is not None:
                columns.setdefault(name, []).append(value)
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    deviations = {name: float(np.std(v)) if len(v) > 1 else 1.0 for name, v in columns.items()}
    scores = {
        model: {
            name: (value - means[name]) / deviations[name] if deviations[name] > 0 else 0.0
            for name, value in row.items()
            if value is not None
        }
        for model, row in figures.items()
    }
    averages = {model: float(np.mean(list(row.values()))) if row else None for model, row in scores.items()}
    return ZScores(means, deviations, scores, averages)

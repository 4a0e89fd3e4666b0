"""Is the gain real? Intervals, paired differences and tests for figures of benchmarks.

Questions on one image are not independent, so what is resampled is images. The draws are keyed by replicate and
number of images alone: two models judged on the same questions are compared on the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from localign.errors import UserError
from localign.probing.bootstrap import CHUNK_BYTES, REPLICATES, interval, replicate_weights
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
    values = [benchmark.aggregate(samples) for samples in (first, second)]
    draws = [bootstrap(benchmark, samples, replicates) for samples in (first, second)]
    found = {}
    for name in draws[0]:
        before, after = (value.get(name) for value in values)
        difference = None if before is None or after is None else after - before
        found[name] = Difference(difference, interval(draws[1][name] - draws[0][name]))
    return found


def check_paired(first: Sequence[Sample], second: Sequence[Sample]) -> None:
    """Refuse to compare answers to different questions. Raises UserError."""
    ids = [{sample["id"] for sample in samples} for samples in (first, second)]
    if ids[0] != ids[1] or len(first) != len(second):
        alone = sorted(ids[0] ^ ids[1])
        example = f", for example {alone[0]}" if alone else ""
        raise UserError(
            f"the models answered different questions: {len(alone)} were put to one of them alone{example}"
        )


class McNemar(NamedTuple):
    """Questions on which two models differ."""

    first_better: int
    second_better: int
    p_value: float
    """Of as uneven a division, or more, if either model were as likely to be the better one; two-sided, exact."""


def mcnemar(first: Sequence[Sample], second: Sequence[Sample]) -> McNemar:
    """McNemar's exact test on the scores of two models; of soft scores, the sign test, which it then is.

    Other than :func:`paired_differences` it takes questions for independent, also where they share an image.

    Raises:
        UserError: The models did not answer the same questions.
    """
    check_paired(first, second)
    scores = [{sample["id"]: sample["score"] for sample in samples} for samples in (first, second)]
    gains = [scores[1][name] - score for name, score in scores[0].items()]
    fewer, more = sum(gain < 0 for gain in gains), sum(gain > 0 for gain in gains)
    return McNemar(fewer, more, _sign_test(fewer, more))


def _sign_test(first: int, second: int) -> float:
    """Twice the probability of at most the smaller number of heads in as many throws of a fair coin."""
    throws, heads = first + second, torch.arange(min(first, second) + 1, dtype=torch.float64)
    total = torch.tensor(float(throws), dtype=torch.float64)
    log_ways = torch.lgamma(total + 1) - torch.lgamma(heads + 1) - torch.lgamma(total - heads + 1)
    return min(1.0, 2 * math.exp(float(torch.logsumexp(log_ways, 0)) - throws * math.log(2)))


# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


def interval_over_seeds(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the mean over training runs that differ in their seed, by Student's t.

    It says what other seeds would give on the same questions; :func:`intervals` says what other images would give to
    the same model. For a gain, give the runs' differences. None for a single run.
    """
    if len(values) < 2:
        return None
    table = np.asarray(values, dtype=np.float64)
    freedom = len(table) - 1
    # Beyond the table: the first terms of the expansion around the normal quantile.
    quantile = (
        _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.960 + 2.372 / freedom + 2.82 / freedom**2
    )
    half = quantile * float(table.std(ddof=1)) / math.sqrt(len(table))
    return [float(table.mean()) - half, float(table.mean()) + half]


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

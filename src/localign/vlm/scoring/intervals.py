"""Is the gain real? Intervals, paired differences and tests for figures of benchmarks.

Questions on one image are not independent, so what is resampled is images. The draws are keyed by replicate and
number of images alone: two models judged on the same questions are compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from localign.statistics.bootstrap import REPLICATES, percentile_interval, weight_chunks
from localign.vlm.scoring.base import Benchmark, Sample
from localign.vlm.scoring.metrics import Draws


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
    parts: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for weights in weight_chunks(len(places), replicates, row_bytes=8 * len(samples)):
        draws = Draws(weights, unit)
        for name, statistic in statistics.items():
            parts[name].append(100 * statistic.replicates(draws))
    return {name: torch.cat(values) for name, values in parts.items()}


def intervals(
    benchmark: Benchmark, samples: Sequence[Sample], replicates: int = REPLICATES
) -> dict[str, list[float] | None]:
    """The 95 % percentile interval of every figure, ``[low, high]`` in percent; None where there is none."""
    return {
        name: percentile_interval(values)
        for name, values in bootstrap(benchmark, samples, replicates).items()
    }

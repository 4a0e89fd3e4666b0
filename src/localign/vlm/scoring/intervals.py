"""Bootstrap intervals for the metrics of a benchmark. Images are resampled, because questions on one image are not
independent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from localign.statistics.bootstrap import REPLICATES, percentile_interval
from localign.statistics.resampling import ResampledMetrics, bootstrap_replicates
from localign.vlm.scoring.base import Benchmark
from localign.vlm.scoring.questions import Sample


def bootstrap(
    benchmark: Benchmark, samples: Sequence[Sample], replicates: int = REPLICATES
) -> dict[str, Tensor]:
    """Every metric on images drawn with replacement, in percent.

    Returns:
        By metric float64 ``(replicates,)``; NaN where a replicate does not define the metric. The order of the
        samples does not matter.
    """
    samples = sorted(samples, key=lambda sample: str(sample["id"]))
    images = [sample["image"] for sample in samples]
    found = bootstrap_replicates(benchmark.metrics(samples), images, replicates)
    return {name: 100 * shares for name, shares in found.items()}


def resampled_metrics(benchmark: Benchmark, samples: Sequence[Sample]) -> ResampledMetrics:
    """Every metric on the images as they are, and on images drawn with replacement; in percent."""
    return ResampledMetrics(benchmark.aggregate(samples), bootstrap(benchmark, samples))


def intervals(
    benchmark: Benchmark, samples: Sequence[Sample], replicates: int = REPLICATES
) -> dict[str, list[float] | None]:
    """The 95 % interval ``[low, high]`` of every metric, in percent; None where no replicate defines the metric."""
    return {
        name: percentile_interval(values)
        for name, values in bootstrap(benchmark, samples, replicates).items()
    }

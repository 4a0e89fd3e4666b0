"""Two models' figures on the same questions, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from localign.statistics.bootstrap import percentile_interval


class Difference(NamedTuple):
    """The second model's figure minus the first's, in points of percent."""

    value: float | None
    interval: list[float] | None
    """Of 95 %; the gain is beyond chance on these questions where 0 lies outside."""


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
        found[name] = Difference(value, percentile_interval(second.draws[name] - draws))
    return found

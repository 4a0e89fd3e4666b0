"""McNemar's exact test: do two models differ on the same questions?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from localign.errors import UserError

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


def check_same(first: Collection[str], second: Collection[str]) -> None:
    """Refuse to compare answers to different questions, told by their ids. Raises UserError."""
    if len(first) != len(second) or set(first) != set(second):
        alone = sorted(set(first) ^ set(second))
        example = f", for example {alone[0]}" if alone else ""
        raise UserError(
            f"the models answered different questions: {len(alone)} were put to one of them alone{example}"
        )

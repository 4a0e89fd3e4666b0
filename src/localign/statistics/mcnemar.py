"""McNemar's exact test: are two models equally often right on the same questions?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

from localign.errors import UserError

_ROUNDING = 1e-9
"""Scores closer than this are equal: means over seeds may differ in their last bit."""


class McNemar(NamedTuple):
    """The questions on which two models differ, and the p-value of that split."""

    first_better: int
    """Questions on which the first model has the higher score."""
    second_better: int
    """Questions on which the second model has the higher score."""
    p_value: float
    """Two-sided and exact: the probability of a split at least as uneven if either model were as likely to win."""


def mcnemar(first: Mapping[str, float], second: Mapping[str, float]) -> McNemar:
    """McNemar's exact test on the scores of two models; for scores between 0 and 1 it is the sign test.

    The test treats questions as independent, also those on the same image. Give the mean score of each question for
    models trained with several seeds.

    Args:
        first: Score by question id.
        second: The other model's.

    Raises:
        UserError: The models did not answer the same questions.
    """
    check_same_questions(first, second)
    gains = [second[name] - score for name, score in first.items()]
    first_better = sum(gain < -_ROUNDING for gain in gains)
    second_better = sum(gain > _ROUNDING for gain in gains)
    return McNemar(first_better, second_better, _sign_test(first_better, second_better))


def _sign_test(first: int, second: int) -> float:
    """Twice the probability of at most ``min(first, second)`` heads in ``first + second`` throws of a fair coin."""
    throws = first + second
    log_factorial = math.lgamma(throws + 1)
    tail = sum(
        math.exp(
            log_factorial - math.lgamma(heads + 1) - math.lgamma(throws - heads + 1) - throws * math.log(2)
        )
        for heads in range(min(first, second) + 1)
    )
    return min(1.0, 2 * tail)


def check_same_questions(first: Collection[str], second: Collection[str]) -> None:
    """Check that two models answered the same questions, compared by id.

    Raises:
        UserError: They did not.
    """
    if len(first) != len(second) or set(first) != set(second):
        unshared = sorted(set(first) ^ set(second))
        example = f", for example {unshared[0]}" if unshared else ""
        raise UserError(
            f"the models answered different questions: {len(unshared)} went to one model only{example}"
        )

"""McNemar's test against sums of binomial coefficients and the normal distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from localign.errors import UserError
from localign.statistics.mcnemar import mcnemar


def by_question(scores: Sequence[float]) -> dict[str, float]:
    return {str(number): score for number, score in enumerate(scores)}


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
    reordered = dict(reversed(by_question(second).items()))
    result = mcnemar(by_question(first), reordered)
    assert result[:2] == (fewer, more)
    assert result.p_value == pytest.approx(p_value)


def test_mcnemar_of_many_questions_is_that_of_the_normal_distribution() -> None:
    fewer, more = 4_900, 5_100
    first, second = (by_question([float(i)] * fewer + [float(1 - i)] * more) for i in (1, 0))
    result = mcnemar(first, second)
    z = (more - fewer - 1) / math.sqrt(fewer + more)
    assert result.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_scores_that_differ_by_rounding_are_equal() -> None:
    assert mcnemar({"a": 0.1 + 0.2}, {"a": 0.3})[:2] == (0, 0)


def test_different_questions_are_refused() -> None:
    with pytest.raises(UserError, match="different questions: 1 went to one model only, for example b"):
        mcnemar({"a": 1.0, "b": 0.0}, {"a": 1.0})
